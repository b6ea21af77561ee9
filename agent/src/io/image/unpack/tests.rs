//! Hostile and ordinary layers, unpacked for real: these tests need root, as the agent does.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

use proptest::prelude::*;
use tar::{EntryType, Header};

use super::*;

/// Builds a stream that no decent archiver would.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn add(
        mut self,
        kind: EntryType,
        name: &str,
        link: &str,
        data: &[u8],
        change: impl FnOnce(&mut Header),
    ) -> Tar {
        let mut header = Header::new_gnu();
        let raw = header.as_mut_bytes();
        raw[..name.len()].copy_from_slice(name.as_bytes());
        raw[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        header.set_mode(if kind == EntryType::Directory { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        change(&mut header);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str, data: &str) -> Tar {
        self.add(EntryType::Regular, name, "", data.as_bytes(), |_| {})
    }

    fn directory(self, name: &str) -> Tar {
        self.add(EntryType::Directory, name, "", b"", |_| {})
    }

    fn symlink(self, name: &str, target: &str) -> Tar {
        self.add(EntryType::Symlink, name, target, b"", |_| {})
    }

    fn link(self, name: &str, target: &str) -> Tar {
        self.add(EntryType::Link, name, target, b"", |_| {})
    }

    fn pax(self, records: &[(&str, &[u8])]) -> Tar {
        let mut block = Vec::new();
        for (key, value) in records {
            let body = key.len() + value.len() + 3;
            let digits = (1..).find(|digits| (body + digits).to_string().len() == *digits).unwrap();
            block.extend_from_slice(format!("{} {key}=", body + digits).as_bytes());
            block.extend_from_slice(value);
            block.push(b'\n');
        }
        self.add(EntryType::XHeader, "pax", "", &block, |_| {})
    }
}

struct Ground {
    base: tempfile::TempDir,
}

impl Ground {
    /// A root to unpack into, with something beside it that must not change.
    fn new() -> Ground {
        let base = tempfile::tempdir().unwrap();
        fs::create_dir(base.path().join("root")).unwrap();
        fs::create_dir(base.path().join("outside")).unwrap();
        fs::write(base.path().join("outside/secret"), "untouched").unwrap();
        Ground { base }
    }

    fn root(&self) -> PathBuf {
        self.base.path().join("root")
    }

    fn unpack(&self, tar: Tar) -> Result<Unpacked, UnpackError> {
        let result = unpack(&tar.0[..], &self.root());
        let beside: Vec<_> =
            fs::read_dir(self.base.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(beside.len(), 2, "{beside:?}");
        assert_eq!(fs::read_dir(self.base.path().join("outside")).unwrap().count(), 1);
        let secret = self.base.path().join("outside/secret");
        assert_eq!(fs::read_to_string(&secret).unwrap(), "untouched");
        assert_eq!(fs::metadata(&secret).unwrap().nlink(), 1);
        result
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.root().join(path)).unwrap()
    }

    fn stat(&self, path: &str) -> fs::Metadata {
        fs::symlink_metadata(self.root().join(path)).unwrap()
    }

    fn is_whiteout(&self, path: &str) -> bool {
        let stat = self.stat(path);
        stat.file_type().is_char_device() && stat.rdev() == 0
    }

    fn is_opaque(&self, path: &str) -> bool {
        xattr::get(self.root().join(path), OPAQUE_XATTR).unwrap().as_deref() == Some(b"y")
    }
}

fn refused(tar: Tar, why: &str) {
    let error = Ground::new().unpack(tar).expect_err(why).to_string();
    assert!(error.contains(why), "{error} lacks {why}");
}

#[test]
fn keeps_all_that_a_file_has() {
    let ground = Ground::new();
    let capability = b"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
    let tar = Tar::default()
        .add(EntryType::Directory, "./", "", b"", |header| header.set_mode(0o711))
        .directory("./bin/")
        .pax(&[
            ("mtime", b"1234567890.5"),
            ("SCHILY.xattr.security.capability", capability),
            ("SCHILY.xattr.user.note", b"a\nb"),
            ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
            ("SCHILY.xattr.user.overlay.opaque", b"y"),
        ])
        .add(EntryType::Regular, "bin/ping", "", b"elf", |header| {
            header.set_mode(0o104755);
            header.set_uid(1000);
            header.set_gid(3_000_000);
        })
        .link("bin/ping6", "/bin/ping")
        .add(EntryType::Symlink, "bin/sh", "busybox", b"", |header| header.set_uid(7))
        .add(EntryType::Char, "null", "", b"", |header| {
            header.set_mode(0o666);
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        })
        .add(EntryType::Fifo, "pipe", "", b"", |_| {});
    let unpacked = ground.unpack(tar).unwrap();
    assert_eq!(unpacked, Unpacked { bytes: 3, entries: 7 });
    assert_eq!(ground.stat("").permissions().mode() & 0o7777, 0o711);
    assert_eq!((ground.stat("").mtime(), ground.stat("bin").mtime()), (1_000_000_000, 1_000_000_000));
    let ping = ground.stat("bin/ping");
    assert_eq!((ping.mode() & 0o7777, ping.uid(), ping.gid(), ping.nlink()), (0o4755, 1000, 3_000_000, 2));
    assert_eq!((ping.mtime(), ping.mtime_nsec()), (1_234_567_890, 500_000_000));
    let attribute = |name| xattr::get(ground.root().join("bin/ping"), name).unwrap();
    assert_eq!(attribute("security.capability").as_deref(), Some(&capability[..]));
    assert_eq!(attribute("user.note").as_deref(), Some(&b"a\nb"[..]));
    assert_eq!(attribute("trusted.overlay.redirect"), None);
    assert_eq!(attribute("user.overlay.opaque"), None);
    assert_eq!((ground.stat("bin/sh").uid(), ground.stat("bin/sh").mtime()), (7, 1_000_000_000));
    assert_eq!(fs::read_link(ground.root().join("bin/sh")).unwrap(), Path::new("busybox"));
    assert_eq!(ground.stat("null").rdev(), makedev(1, 3));
    assert_eq!(ground.stat("null").mode() & 0o7777, 0o666);
    assert!(ground.stat("pipe").file_type().is_fifo());
}

#[test]
fn whiteouts_become_overlayfs_own() {
    let ground = Ground::new();
    let tar = Tar::default()
        .file("etc/.wh.hosts", "")
        .file("var/cache/.wh..wh..opq", "")
        .file("var/cache/new", "x")
        // A whiteout says nothing about what is in its own layer, before or after it.
        .file("kept", "1")
        .file(".wh.kept", "")
        .file("dir/inner", "2")
        .file(".wh.dir", "")
        .file(".wh.later", "")
        .file("later/inner", "3")
        .file(".wh.again", "")
        .directory("again/")
        .file(".wh..wh.plnk/1.2", "")
        .file(".wh..wh.aufs", "");
    ground.unpack(tar).unwrap();
    assert!(ground.is_whiteout("etc/hosts"));
    assert!(ground.is_opaque("var/cache") && !ground.is_opaque("var"));
    assert_eq!(ground.read("kept"), "1");
    assert!(ground.is_opaque("dir") && ground.read("dir/inner") == "2");
    assert!(ground.is_opaque("later") && ground.read("later/inner") == "3");
    assert!(ground.is_opaque("again"));
    let names =
        fs::read_dir(ground.root()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(names.into_iter().all(|name| !name.starts_with(".wh.")));
    refused(Tar::default().file(".wh...", ""), "whiteout of nothing");
    refused(Tar::default().file(".wh..", ""), "whiteout of nothing");
    refused(Tar::default().file(".wh.", ""), "whiteout of nothing");
    refused(Tar::default().file(".wh.a/b", ""), "below a whiteout");
}

#[test]
fn later_entries_replace_earlier_ones() {
    let ground = Ground::new();
    let tar = Tar::default()
        .file("a/b/c", "1")
        .file("a/b/c", "22")
        .symlink("x", "a")
        .file("x", "no link any more")
        .file("gone/deep/file", "")
        .file("gone", "a file")
        .file("dir/kept", "k")
        .add(EntryType::Directory, "dir", "", b"", |header| header.set_mode(0o700));
    ground.unpack(tar).unwrap();
    assert_eq!(ground.read("a/b/c"), "22");
    assert_eq!(ground.read("x"), "no link any more");
    assert_eq!(ground.read("gone"), "a file");
    assert_eq!(ground.read("dir/kept"), "k");
    assert_eq!(ground.stat("dir").permissions().mode() & 0o777, 0o700);
}

#[test]
fn nothing_escapes() {
    let outside = |ground: &Ground| ground.base.path().join("outside").to_str().unwrap().to_owned();
    refused(Tar::default().file("../outside/secret", "x"), "\"..\"");
    refused(Tar::default().file("a/../../outside/secret", "x"), "\"..\"");
    refused(Tar::default().file("..", "x"), "\"..\"");
    refused(Tar::default().link("a", "../outside/secret"), "\"..\"");
    refused(Tar::default().link("a", "missing"), "nothing in this layer");
    refused(Tar::default().directory("d").link("a", "d"), "to a directory");
    refused(Tar::default().link("a", "/"), "root directory");
    refused(Tar::default().file(".", "x"), "root directory");
    refused(Tar::default().symlink("loop", "loop").file("loop/a", "x"), "loop");
    refused(Tar::default().file("file", "x").file("file/a", "x"), "not a directory");
    refused(
        Tar::default().symlink("dangling", "nowhere").file("dangling/a", "x"),
        "symbolic link to nothing",
    );
    let ground = Ground::new();
    let path = outside(&ground);
    // An absolute path is one in the layer; so is where a symbolic link leads.
    ground.unpack(Tar::default().file(&format!("{path}/secret"), "inside")).unwrap();
    assert_eq!(ground.read(&path[1..].to_owned().add("/secret")), "inside");
    let ground = Ground::new();
    let path = outside(&ground);
    let tar = Tar::default().symlink("up", "../../../../..").file(&format!("up{path}/secret"), "inside");
    ground.unpack(tar).unwrap();
    assert_eq!(ground.read(&path[1..].to_owned().add("/secret")), "inside");
    let ground = Ground::new();
    let path = outside(&ground);
    let tar = Tar::default().symlink("abs", &path).directory(&path).file("abs/secret", "inside");
    ground.unpack(tar).unwrap();
    for hostile in [
        Tar::default().symlink("abs", &path).link("stolen", "abs/secret"),
        Tar::default().symlink("abs", &path).file("abs/secret", "x"),
        Tar::default().symlink("abs", &path).file("abs/.wh.secret", ""),
        Tar::default().symlink("abs", &path).file("abs/.wh..wh..opq", ""),
        Tar::default().symlink("fd", "/proc/self/root").file("fd/etc/x", ""),
    ] {
        Ground::new().unpack(hostile).unwrap_err();
    }
    // The last component is replaced, never followed.
    let ground = Ground::new();
    let secret = format!("{}/secret", outside(&ground));
    ground.unpack(Tar::default().symlink("s", &secret).file("s", "inside")).unwrap();
    assert_eq!(ground.read("s"), "inside");
    // A link that was there before is no better.
    let ground = Ground::new();
    symlink(ground.base.path().join("outside"), ground.root().join("old")).unwrap();
    ground.unpack(Tar::default().file("old/secret", "x")).unwrap_err();
    ground.unpack(Tar::default().symlink("s", &secret).link("hard", "s")).unwrap();
    assert!(ground.stat("hard").file_type().is_symlink());
}

trait Add {
    fn add(self, tail: &str) -> String;
}

impl Add for String {
    fn add(mut self, tail: &str) -> String {
        self.push_str(tail);
        self
    }
}

fn component() -> impl Strategy<Value = String> {
    prop_oneof![
        6 => "[abc]",
        1 => Just("..".to_owned()),
        1 => Just(".".to_owned()),
        1 => Just(".wh.a".to_owned()),
        1 => Just(".wh..wh..opq".to_owned()),
        1 => Just("outside".to_owned()),
        1 => Just("secret".to_owned()),
    ]
}

fn path() -> impl Strategy<Value = String> {
    (any::<bool>(), proptest::collection::vec(component(), 0..5))
        .prop_map(|(absolute, parts)| format!("{}{}", if absolute { "/" } else { "" }, parts.join("/")))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_sequence_of_entries_escapes(entries in proptest::collection::vec((0..6_u8, path(), path()), 1..12)) {
        let ground = Ground::new();
        let mut tar = Tar::default();
        for (kind, path, link) in &entries {
            let kind = [
                EntryType::Regular, EntryType::Directory, EntryType::Symlink, EntryType::Symlink, EntryType::Link,
                EntryType::Fifo,
            ][usize::from(*kind)];
            tar = tar.add(kind, path, link, if kind.is_file() { b"data" } else { b"" }, |_| {});
        }
        let _ = ground.unpack(tar);
    }

    #[test]
    fn ordinary_trees_come_out_as_they_went_in(
        files in proptest::collection::btree_map("[ab]{1,3}(/[cd]{1,3}){0,2}/f", "[a-z]{0,600}", 1..12),
    ) {
        let ground = Ground::new();
        let tar = files.iter().fold(Tar::default(), |tar, (name, data)| tar.file(name, data));
        ground.unpack(tar).unwrap();
        let read: BTreeMap<String, String> = files.keys().map(|name| (name.clone(), ground.read(name))).collect();
        prop_assert_eq!(read, files);
    }
}
