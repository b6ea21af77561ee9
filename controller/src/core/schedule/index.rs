//! Scores of one class of pods for every room, kept so that the best room is found without looking at all: one byte a
//! room, rooms of one kind of device together in blocks of 64, and each block's highest score.

/// Rooms in a block.
pub const BLOCK: usize = 64;

/// Scores by slot, 0 where the pod does not fit.
#[derive(Debug, Clone, Default)]
pub struct Row {
    scores: Vec<u8>,
    maxima: Vec<u8>,
    /// Changes up to here are in.
    pub seen: u64,
    /// When it was last asked.
    pub used: u64,
    /// It was never filled, or for other prices.
    pub stale: bool,
}

impl Row {
    pub fn stale() -> Self {
        Self { stale: true, ..Self::default() }
    }

    pub fn grow(&mut self, blocks: usize) {
        self.scores.resize(blocks * BLOCK, 0);
        self.maxima.resize(blocks, 0);
    }

    #[inline]
    pub fn score(&self, slot: usize) -> u8 {
        self.scores[slot]
    }

    /// The highest score of a block.
    #[inline]
    pub fn highest(&self, block: usize) -> u8 {
        self.maxima[block]
    }

    #[inline]
    pub fn set(&mut self, slot: usize, score: u8) {
        let block = slot / BLOCK;
        let old = std::mem::replace(&mut self.scores[slot], score);
        let top = self.maxima[block];
        if score >= top {
            self.maxima[block] = score;
        } else if old == top {
            self.maxima[block] = highest(&self.scores[block * BLOCK..(block + 1) * BLOCK]);
        }
    }

    /// The first slot with the highest score of `blocks`, and that score.
    #[inline]
    pub fn best(&self, blocks: &[u32]) -> Option<(u8, usize)> {
        let mut top = (0, 0);
        for block in blocks {
            let score = self.maxima[*block as usize];
            if score > top.0 {
                top = (score, *block as usize);
            }
        }
        let (score, block) = top;
        if score == 0 {
            return None;
        }
        let scores = &self.scores[block * BLOCK..(block + 1) * BLOCK];
        Some((score, block * BLOCK + scores.iter().position(|s| *s == score)?))
    }

    /// As `best`, of the slots that `allowed` lets through.
    pub fn best_of(&self, blocks: &[u32], allowed: impl Fn(usize) -> bool) -> Option<(u8, usize)> {
        let mut top: Option<(u8, usize)> = None;
        for block in blocks.iter().map(|block| *block as usize) {
            if self.maxima[block] <= top.map_or(0, |top| top.0) {
                continue;
            }
            for slot in block * BLOCK..(block + 1) * BLOCK {
                let score = self.scores[slot];
                if score > top.map_or(0, |top| top.0) && allowed(slot) {
                    top = Some((score, slot));
                }
            }
        }
        top
    }
}

#[inline]
fn highest(scores: &[u8]) -> u8 {
    scores.iter().fold(0, |top, score| top.max(*score))
}
