"""Trains a small neural network on handwritten digits and says how well it reads those it has not seen.

Usage: train.py DATA.csv.gz   (environment: EPOCHS, HIDDEN, RATE; JOB_COMPLETION_INDEX picks the seed)
"""

import hashlib
import os
import sys
import time

import numpy as np

SEED = int(os.environ.get("JOB_COMPLETION_INDEX", 0))
EPOCHS = int(os.environ.get("EPOCHS", 20))
HIDDEN = int(os.environ.get("HIDDEN", 48))
RATE = float(os.environ.get("RATE", 0.2))
BATCH = 32


def load(path):
    """Pixels scaled to 0..1, labels, shuffled; a fifth is kept for the test."""
    table = np.loadtxt(path, delimiter=",")
    table = table[np.random.default_rng(SEED).permutation(len(table))]
    pixels, labels = table[:, :64] / 16, table[:, 64].astype(int)
    test = len(table) // 5
    return pixels[test:], labels[test:], pixels[:test], labels[:test]


def softmax(scores):
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def main():
    x, y, x_test, y_test = load(sys.argv[1])
    rng = np.random.default_rng(SEED)
    w1, b1 = rng.normal(0, 0.2, (64, HIDDEN)), np.zeros(HIDDEN)
    w2, b2 = rng.normal(0, 0.2, (HIDDEN, 10)), np.zeros(10)

    def accuracy(pixels, labels):
        guess = np.maximum(pixels @ w1 + b1, 0) @ w2 + b2
        return (guess.argmax(axis=1) == labels).mean()

    print(f"seed {SEED}: {len(x)} images to learn, {len(x_test)} to test, {HIDDEN} hidden units", flush=True)
    for epoch in range(1, EPOCHS + 1):
        order, loss = rng.permutation(len(x)), 0.0
        for start in range(0, len(x), BATCH):
            rows = order[start : start + BATCH]
            hidden = np.maximum(x[rows] @ w1 + b1, 0)
            guess = softmax(hidden @ w2 + b2)
            loss -= np.log(guess[np.arange(len(rows)), y[rows]] + 1e-12).sum()
            slope = guess
            slope[np.arange(len(rows)), y[rows]] -= 1
            slope /= len(rows)
            back = (slope @ w2.T) * (hidden > 0)
            w2 -= RATE * hidden.T @ slope
            b2 -= RATE * slope.sum(axis=0)
            w1 -= RATE * x[rows].T @ back
            b1 -= RATE * back.sum(axis=0)
        print(f"epoch {epoch:2}: loss {loss / len(x):.4f}, test accuracy {accuracy(x_test, y_test):.3f}", flush=True)
        time.sleep(float(os.environ.get("PAUSE", 0)))
    print(f"done: reads {accuracy(x_test, y_test):.1%} of unseen digits", flush=True)
    weights = hashlib.sha256(b"".join(part.tobytes() for part in (w1, b1, w2, b2))).hexdigest()
    print(f"weights {weights[:16]}", flush=True)


if __name__ == "__main__":
    main()
