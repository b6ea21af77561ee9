//! Texts that tests compare with files in `golden/`; `BERTH_GOLDEN=write` writes them anew.

use std::path::{Path, PathBuf};

pub fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli/golden")
}

pub fn check(path: &Path, shown: &str) {
    if std::env::var("BERTH_GOLDEN").is_ok_and(|word| word == "write") {
        std::fs::write(path, shown).unwrap();
    }
    let want = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(shown, want, "{}", path.display());
}
