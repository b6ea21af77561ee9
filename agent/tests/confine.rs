//! What a child that reads somebody's bytes can still do, and what not. Needs root, and a kernel with Landlock.

use std::fs;
use std::io::{self, ErrorKind};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::chown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;

use berth_agent::io::confine::{Room, confine};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Something of each kind that a child may reach, and that it may not.
struct Ground {
    dir: tempfile::TempDir,
    tcp: TcpListener,
    _unix: UnixListener,
    other: Child,
}

impl Ground {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["given", "shown", "hidden"] {
            fs::create_dir_all(dir.path().join(name).join("inner")).unwrap();
            fs::write(dir.path().join(name).join("file"), name).unwrap();
        }
        Self {
            tcp: TcpListener::bind("127.0.0.1:0").unwrap(),
            _unix: UnixListener::bind(dir.path().join("service")).unwrap(),
            other: Command::new("sleep").arg("1000").spawn().unwrap(),
            dir,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn room(&self) -> Room {
        Room {
            reads: vec![self.path("shown"), self.path("not there")],
            writes: vec![self.path("given")],
            capabilities: &[],
            network: false,
        }
    }

    /// What of these works out, as it is now, and as a thread finds it that is confined.
    fn tries(&self, room: &Room, what: &[&(dyn Fn() -> io::Result<()> + Sync)]) -> Vec<Option<ErrorKind>> {
        for tried in what {
            tried().expect("without confinement");
        }
        thread::scope(|scope| {
            let confined = scope.spawn(|| {
                confine(room).unwrap();
                what.iter().map(|tried| tried().err().map(|error| error.kind())).collect()
            });
            confined.join().unwrap()
        })
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let _ = self.other.kill();
        let _ = self.other.wait();
    }
}

const REFUSED: Option<ErrorKind> = Some(ErrorKind::PermissionDenied);
const ACROSS: Option<ErrorKind> = Some(ErrorKind::CrossesDevices);

fn read(path: &Path) -> io::Result<()> {
    fs::read(path).map(drop)
}

#[test]
fn files_are_those_it_is_for() {
    let ground = Ground::new();
    let path = |name: &str| ground.path(name);
    let found = ground.tries(
        &ground.room(),
        &[
            &|| read(&path("given/file")),
            &|| fs::write(path("given/new"), b"x"),
            &|| fs::rename(path("given/new"), path("given/inner/new")),
            &|| fs::hard_link(path("given/inner/new"), path("given/new")),
            &|| fs::remove_file(path("given/new")),
            &|| read(&path("shown/file")),
            &|| fs::read_dir(path("shown")).map(drop),
        ],
    );
    assert_eq!(found, [None; 7]);
    let found = ground.tries(
        &ground.room(),
        &[
            &|| fs::write(path("shown/file"), b"x"),
            &|| fs::create_dir(path("shown/new")).and_then(|()| fs::remove_dir(path("shown/new"))),
            &|| read(&path("hidden/file")),
            &|| fs::read_dir(path("hidden")).map(drop),
            &|| fs::write(path("hidden/file"), b"x"),
            &|| read(Path::new("/etc/passwd")),
            &|| read(Path::new("/proc/1/status")),
        ],
    );
    assert_eq!(found, [REFUSED; 7]);
    // Out of the given one into another, by a link or by its name.
    let found = ground.tries(
        &ground.room(),
        &[
            &|| {
                fs::hard_link(path("given/file"), path("hidden/link"))
                    .and_then(|()| fs::remove_file(path("hidden/link")))
            },
            &|| {
                fs::rename(path("given/inner"), path("hidden/moved"))
                    .and_then(|()| fs::rename(path("hidden/moved"), path("given/inner")))
            },
        ],
    );
    assert!(found.iter().all(|found| *found == REFUSED || *found == ACROSS), "{found:?}");
}

#[test]
fn no_program_runs_and_nobody_is_spoken_to() {
    let ground = Ground::new();
    let address = ground.tcp.local_addr().unwrap();
    let other = Pid::from_raw(i32::try_from(ground.other.id()).unwrap());
    let found = ground.tries(
        &ground.room(),
        &[
            &|| Command::new("/bin/true").status().map(drop),
            &|| UnixStream::connect(ground.path("service")).map(drop),
            &|| TcpStream::connect(address).map(drop),
            &|| Ok(kill(other, Signal::SIGCONT)?),
        ],
    );
    assert_eq!(found, [REFUSED; 4]);
    let found = ground.tries(
        &Room { network: true, ..ground.room() },
        &[&|| TcpStream::connect(address).map(drop), &|| read(Path::new("/etc/hosts"))],
    );
    assert_eq!(found, [None; 2]);
}

#[test]
fn of_roots_rights_it_keeps_what_it_is_for() {
    let ground = Ground::new();
    let tried: [&(dyn Fn() -> io::Result<()> + Sync); 2] =
        [&|| chown(ground.path("given/file"), Some(1000), None), &|| {
            // In a thread of its own, that nothing else is where this leads.
            thread::scope(|scope| scope.spawn(|| Ok(unshare(CloneFlags::CLONE_NEWUTS)?)).join().unwrap())
        }];
    assert_eq!(ground.tries(&ground.room(), &tried), [REFUSED; 2]);
    let owner = Room { capabilities: &["CHOWN", "SYS_ADMIN"], ..ground.room() };
    assert_eq!(ground.tries(&owner, &tried), [None, REFUSED]);
}
