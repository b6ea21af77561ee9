//! What a container's process is to be: its arguments, environment and user, from job and image. Reads the image's
//! own files for users; changes nothing.

use std::collections::BTreeMap;

use berth_protocol::job::ContainerSpec;
use nix::sys::signal::Signal;

use crate::task::{ImageProcess, Root};

const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Lines of a user database beyond this are not looked at.
const DATABASE_LINES_MAX: usize = 100_000;

/// Kubernetes' rule: `command` replaces entrypoint and cmd, `args` replaces cmd.
pub fn args(spec: &ContainerSpec, image: &ImageProcess) -> Vec<String> {
    let (head, tail) = match (spec.command.is_empty(), spec.args.is_empty()) {
        (false, _) => (&spec.command, &spec.args),
        (true, false) => (&image.entrypoint, &spec.args),
        (true, true) => (&image.entrypoint, &image.cmd),
    };
    head.iter().chain(tail).cloned().collect()
}

/// What the image wants to be stopped by (`SIGQUIT`, `QUIT` or `3`); SIGTERM where it names nothing that is one.
pub fn stop_signal(root: &Root) -> Signal {
    let Root::Image { config: ImageProcess { stop_signal: Some(word), .. }, .. } = root else {
        return Signal::SIGTERM;
    };
    let by_number = word.parse::<i32>().ok().and_then(|number| Signal::try_from(number).ok());
    let upper = word.to_ascii_uppercase();
    let name = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    by_number.or_else(|| name.parse().ok()).unwrap_or(Signal::SIGTERM)
}

/// Later ones win: berth's own, the image's, the devices', the job's.
pub fn env(
    spec: &ContainerSpec,
    image: &ImageProcess,
    devices: impl Iterator<Item = String>,
    hostname: &str,
    home: &str,
    index: u32,
) -> Vec<String> {
    let base = [
        format!("PATH={PATH_DEFAULT}"),
        format!("HOSTNAME={hostname}"),
        format!("HOME={home}"),
        // Kubernetes' name for which of a job's pods this is.
        format!("JOB_COMPLETION_INDEX={index}"),
    ];
    let mut all: BTreeMap<String, String> = base
        .into_iter()
        .chain(image.env.iter().cloned())
        .chain(devices)
        .filter_map(|pair| pair.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned())))
        .collect();
    all.extend(spec.env.clone());
    all.into_iter().map(|(name, value)| format!("{name}={value}")).collect()
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: String,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    #[error("user `{0}` is not in the image's /etc/passwd; give a number, or a name that is")]
    NoUser(String),
    #[error("group `{0}` is not in the image's /etc/group; give a number, or a name that is")]
    NoGroup(String),
    #[error(
        "user `{name}` is {uid}:{gid} in the image, beyond the numbers of a user namespace; write `user: \"{uid}:{gid}\"`, and \
         the pod has none"
    )]
    Beyond { name: String, uid: u32, gid: u32 },
}

/// `wanted` is `uid`, `name`, `uid:gid`, `name:group`; empty is root. `passwd` and `group` are the image's files.
pub fn user(wanted: &str, passwd: &str, group: &str) -> Result<User, UserError> {
    let (name, group_name) = match wanted.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (wanted, None),
    };
    let name = if name.is_empty() { "0" } else { name };
    let lines = |text: &str| -> Vec<Vec<String>> {
        text.lines().take(DATABASE_LINES_MAX).map(|l| l.split(':').map(str::to_owned).collect()).collect()
    };
    // name:password:uid:gid:comment:home:shell
    let entry = lines(passwd).into_iter().find(|f| f.len() >= 6 && (f[0] == name || f[2] == name));
    let uid = match (name.parse(), &entry) {
        (Ok(uid), _) => uid,
        (Err(_), Some(fields)) => fields[2].parse().map_err(|_| UserError::NoUser(name.to_owned()))?,
        (Err(_), None) => return Err(UserError::NoUser(name.to_owned())),
    };
    // name:password:gid:members
    let groups = lines(group);
    let gid = match group_name {
        Some(wanted) => match wanted.parse() {
            Ok(gid) => gid,
            Err(_) => groups
                .iter()
                .find(|f| f.len() >= 3 && f[0] == wanted)
                .and_then(|f| f[2].parse().ok())
                .ok_or_else(|| UserError::NoGroup(wanted.to_owned()))?,
        },
        None => entry.as_ref().and_then(|f| f[3].parse().ok()).unwrap_or(0),
    };
    let member = |f: &&Vec<String>| {
        entry.as_ref().is_some_and(|e| f.len() >= 4 && f[3].split(',').any(|member| member == e[0]))
    };
    let more = match group_name {
        Some(_) => Vec::new(),
        None => {
            groups.iter().filter(member).filter_map(|f| f[2].parse().ok()).filter(|g| *g != gid).collect()
        }
    };
    let home = entry.map(|f| f[5].clone()).filter(|home| home.starts_with('/')).unwrap_or("/".to_owned());
    Ok(User { uid, gid, groups: more, home })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nada:x:1000:1000:,,,:/home/ada:/bin/sh\nbad line\n";
    const GROUP: &str = "root:x:0:\nada:x:1000:\naudio:x:29:ada,bob\nvideo:x:44:bob\n";

    #[test]
    fn images_say_by_what_they_are_stopped() {
        let signal = |word: Option<&str>| {
            let config = ImageProcess { stop_signal: word.map(str::to_owned), ..ImageProcess::default() };
            stop_signal(&Root::Image { layers: Vec::new(), config })
        };
        for word in ["SIGQUIT", "quit", "3"] {
            assert_eq!(signal(Some(word)), Signal::SIGQUIT, "{word}");
        }
        for word in [None, Some("SIGRTMIN+3"), Some("nonsense"), Some("99")] {
            assert_eq!(signal(word), Signal::SIGTERM, "{word:?}");
        }
        assert_eq!(stop_signal(&Root::Host), Signal::SIGTERM);
    }

    #[test]
    fn users() {
        let user = |wanted| user(wanted, PASSWD, GROUP);
        let of = |uid, gid, groups: &[u32], home: &str| {
            Ok(User { uid, gid, groups: groups.to_vec(), home: home.to_owned() })
        };
        assert_eq!(user(""), of(0, 0, &[], "/root"));
        assert_eq!(user("ada"), of(1000, 1000, &[29], "/home/ada"));
        assert_eq!(user("1000"), of(1000, 1000, &[29], "/home/ada"));
        assert_eq!(user("1000:44"), of(1000, 44, &[], "/home/ada"));
        assert_eq!(user("ada:video"), of(1000, 44, &[], "/home/ada"));
        assert_eq!(user("1234"), of(1234, 0, &[], "/"));
        assert_eq!(user("1234:5678"), of(1234, 5678, &[], "/"));
        assert_eq!(user("eve"), Err(UserError::NoUser("eve".to_owned())));
        assert_eq!(user("ada:eve"), Err(UserError::NoGroup("eve".to_owned())));
    }

    fn spec(command: &[&str], args: &[&str]) -> ContainerSpec {
        let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        ContainerSpec { command: own(command), args: own(args), ..super::super::testing::container() }
    }

    #[test]
    fn arguments_as_kubernetes_has_them() {
        let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let image = ImageProcess { entrypoint: own(&["ep"]), cmd: own(&["cmd"]), ..ImageProcess::default() };
        for (command, given, expect) in [
            (&[][..], &[][..], &["ep", "cmd"][..]),
            (&["c"], &[], &["c"]),
            (&[], &["a"], &["ep", "a"]),
            (&["c"], &["a"], &["c", "a"]),
        ] {
            assert_eq!(args(&spec(command, given), &image), expect);
        }
    }

    #[test]
    fn the_jobs_environment_wins() {
        let mut spec = spec(&[], &[]);
        spec.env = BTreeMap::from([("A".to_owned(), "job=1".to_owned())]);
        let image =
            ImageProcess { env: vec!["A=image".to_owned(), "PATH=/x".to_owned()], ..ImageProcess::default() };
        let env = env(&spec, &image, ["A=dev".to_owned()].into_iter(), "pod-0", "/root", 3);
        let expect = ["A=job=1", "HOME=/root", "HOSTNAME=pod-0", "JOB_COMPLETION_INDEX=3", "PATH=/x"];
        assert_eq!(env, expect);
    }
}
