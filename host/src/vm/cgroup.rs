//! A control group (v2) for each VM: its processors' weight and limit, which processors it may use, and the most memory it
//! can ever take. They lie in a group of their own below the hierarchy's root, not in that of the daemon's service: a
//! service manager that ends all of a service's group leaves the VMs alone.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::spec::{CpuSpec, VmSpec};

/// Group of all VMs.
const GROUP: &str = "switchyard";
/// What a worker takes beside its guest's memory, in bytes, page tables for the guest aside: far more than it ever needs.
const OWN_MEMORY: u64 = 64 << 20;
/// Period of a limit in microseconds, the kernel's default.
const PERIOD: u64 = 100_000;

/// The host's hierarchy, or why there is none to use.
#[derive(Debug, Clone)]
pub struct Cgroups(Result<Group, String>);

/// The group of all VMs.
#[derive(Debug, Clone)]
struct Group {
    path: PathBuf,
    /// Why VMs cannot be kept to processors, if they cannot.
    no_cpuset: Option<String>,
}

/// The group of one VM.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    /// The processors that were written last, if any were.
    kept_to: Option<Vec<usize>>,
}

impl Cgroups {
    /// The hierarchy that this host has mounted, with the processor controller at hand.
    pub fn of_this_host() -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        match mount(&mounts) {
            Some(root) => Self::below(Path::new(root)),
            None => Self(Err("no cgroup v2 is mounted".into())),
        }
    }

    /// The hierarchy whose root is at `root`.
    pub fn below(root: &Path) -> Self {
        Self(prepare(root).map_err(|error| format!("{}: {error}", root.display())))
    }

    /// None, for the reason given.
    pub fn none(reason: impl Into<String>) -> Self {
        Self(Err(reason.into()))
    }

    /// Makes the group of VM `name`, or takes the one that is there.
    ///
    /// # Errors
    /// Why it has none, in words for the operator.
    pub fn group(&self, name: &str) -> Result<Cgroup, String> {
        let path = self.0.as_ref().map_err(Clone::clone)?.path.join(name);
        match std::fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(format!("{}: {error}", path.display()))
            }
            _ => Ok(Cgroup { path, kept_to: None }),
        }
    }

    /// Removes the group of VM `name`, if there is one; it must be empty.
    pub fn remove(&self, name: &str) {
        let Ok(group) = &self.0 else { return };
        match std::fs::remove_dir(group.path.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("{}: {error}", group.path.join(name).display());
            }
            _ => {}
        }
    }

    /// Why VMs that have groups cannot be kept to processors, if they cannot.
    pub fn no_cpuset(&self) -> Option<&str> {
        self.0.as_ref().ok()?.no_cpuset.as_deref()
    }
}

/// Where the first cgroup2 of `/proc/self/mounts` is.
fn mount(mounts: &str) -> Option<&str> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (path, kind) = (fields.nth(1)?, fields.next()?);
        (kind == "cgroup2").then_some(path)
    })
}

/// Has the controllers handed down to the group of all VMs: that of processors, and two others where they are.
fn prepare(root: &Path) -> io::Result<Group> {
    let offered = std::fs::read_to_string(root.join("cgroup.controllers"))?;
    let offered = |wanted: &str| offered.split_whitespace().any(|controller| controller == wanted);
    if !offered("cpu") {
        return Err(io::Error::other("the cpu controller is not offered (does cgroup v1 hold it?)"));
    }
    let group = root.join(GROUP);
    match std::fs::create_dir(&group) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let mut no_cpuset = (!offered("cpuset")).then(|| "the cpuset controller is not offered".to_owned());
    for parent in [root, &group] {
        hand_down(parent, "cpu")?;
        if no_cpuset.is_none() {
            let handed = hand_down(parent, "cpuset");
            no_cpuset = handed.err().map(|error| format!("{}: {error}", parent.display()));
        }
        if offered("memory")
            && let Err(error) = hand_down(parent, "memory")
        {
            tracing::debug!("{}: VMs' memory is not limited: {error}", parent.display());
        }
    }
    Ok(Group { path: group, no_cpuset })
}

fn hand_down(parent: &Path, controller: &str) -> io::Result<()> {
    let control = parent.join("cgroup.subtree_control");
    let enabled = std::fs::read_to_string(&control).unwrap_or_default();
    if enabled.split_whitespace().any(|enabled| enabled == controller) {
        return Ok(());
    }
    std::fs::write(&control, format!("+{controller}"))
}

impl Cgroup {
    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sets weight and limit of a VM on a host of `cpus` processors.
    ///
    /// # Errors
    /// What the kernel refused, in words for the operator.
    pub fn apply(&self, spec: &VmSpec, cpus: usize) -> Result<(), String> {
        self.write("cpu.weight", &weight(spec, cpus).to_string())?;
        self.write("cpu.max", &limit(spec))?;
        // Without the controller there is no such file.
        if self.path.join("memory.max").exists() {
            self.write("memory.max", &most_memory(spec).to_string())?;
        }
        Ok(())
    }

    /// Keeps it to these processors; an empty list leaves that to the group above. A group without the controller uses all.
    ///
    /// # Errors
    /// What the kernel refused, in words for the operator; it is not asked again for the same. It refuses an empty list
    /// where there are processes and a list (`validate_change` of kernel/cgroup/cpuset.c).
    pub fn keep_to(&mut self, cpus: &[usize]) -> Result<(), String> {
        if self.kept_to.as_deref() == Some(cpus) {
            return Ok(());
        }
        let Ok(before) = std::fs::read_to_string(self.path.join("cpuset.cpus")) else { return Ok(()) };
        self.kept_to = Some(cpus.to_vec());
        if cpus.is_empty() && before.trim().is_empty() {
            return Ok(());
        }
        let list: Vec<_> = cpus.iter().map(ToString::to_string).collect();
        self.write("cpuset.cpus", &format!("{}\n", list.join(",")))
    }

    /// The processors that it was told to keep to, if it was told any.
    pub fn kept_to(&self) -> &[usize] {
        self.kept_to.as_deref().unwrap_or_default()
    }

    /// Puts a process with all its threads into it.
    pub fn enter(&self, pid: u32) -> Result<(), String> {
        self.write("cgroup.procs", &pid.to_string())
    }

    fn write(&self, file: &str, value: &str) -> Result<(), String> {
        let path = self.path.join(file);
        let mut open = std::fs::OpenOptions::new();
        let open = open.write(true).truncate(true).open(&path);
        let written = open.and_then(|mut file| file.write_all(value.as_bytes()));
        written.map_err(|error| format!("{}: {error}", path.display()))
    }
}

/// `cpu.weight`. The kernel knows weights, no reserves: a reserve is a floor under the weight, on a scale on which 10000 is
/// the whole host. While all floors together are no more than the host, and VMs without a reserve have weights small
/// against 10000, each gets at least about its reserve.
fn weight(spec: &VmSpec, cpus: usize) -> u64 {
    let host = 100 * u64::try_from(cpus.max(1)).unwrap_or(u64::MAX);
    let reserved = u64::from(spec.cpu.reserve) * u64::from(spec.vcpus);
    let floor = reserved.saturating_mul(u64::from(CpuSpec::MAX_WEIGHT)) / host;
    u64::from(spec.cpu.weight).max(floor).clamp(1, u64::from(CpuSpec::MAX_WEIGHT))
}

/// `cpu.max`: microseconds in each period.
fn limit(spec: &VmSpec) -> String {
    match spec.cpu.limit {
        100.. => format!("max {PERIOD}"),
        percent => format!("{} {PERIOD}", u64::from(percent) * u64::from(spec.vcpus) * PERIOD / 100),
    }
}

/// `memory.max` in bytes: the guest's maximum, the page tables for it (two words a page, and some more), and the worker.
fn most_memory(spec: &VmSpec) -> u64 {
    spec.memory.maximum.saturating_add(spec.memory.maximum / 128).saturating_add(OWN_MEMORY)
}

#[cfg(test)]
mod tests {
    use super::super::tests::spec;
    use super::*;

    /// What the kernel shows of a hierarchy, as plain files.
    fn hierarchy(controllers: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("cgroup.controllers"), controllers).unwrap();
        root
    }

    #[test]
    fn group_has_weight_limit_and_the_process() {
        let root = hierarchy("cpuset cpu io memory\n");
        let mut spec = spec("web");
        (spec.vcpus, spec.cpu.limit, spec.cpu.weight) = (4, 50, 300);
        let group = Cgroups::below(root.path()).group("web").unwrap();
        for file in ["cpu.weight", "cpu.max", "memory.max", "cgroup.procs"] {
            std::fs::write(group.path().join(file), "").unwrap();
        }
        group.apply(&spec, 8).unwrap();
        group.enter(77).unwrap();
        let read =
            |file: &str| std::fs::read_to_string(root.path().join("switchyard/web").join(file)).unwrap();
        assert_eq!((read("cpu.weight"), read("cpu.max")), ("300".into(), "200000 100000".into()));
        assert_eq!(read("cgroup.procs"), "77");
        let most: u64 = read("memory.max").parse().unwrap();
        assert!((spec.memory.maximum + OWN_MEMORY..spec.memory.maximum * 2 + OWN_MEMORY).contains(&most));
        let enabled = std::fs::read_to_string(root.path().join("switchyard/cgroup.subtree_control")).unwrap();
        // A plain file keeps what was written last.
        assert_eq!(enabled, "+memory");
    }

    #[test]
    fn kernel_takes_changes_of_weight_limit_and_reserve_while_a_process_runs() {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let root =
            Path::new(mount(&mounts).unwrap_or("/nonexistent")).join(format!("test{}", std::process::id()));
        let made = std::fs::create_dir(&root).map_err(|error| error.to_string());
        let group = made.and_then(|()| Cgroups::below(&root).group("web"));
        let Ok(group) = group else {
            let _ = std::fs::remove_dir(&root);
            eprintln!("skipped, no cgroup v2 with the cpu controller to write to: {group:?}");
            return;
        };
        let mut process = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        group.enter(process.id()).unwrap();
        let mut spec = spec("web");
        spec.vcpus = 2;
        let read = |file: &str| std::fs::read_to_string(group.path().join(file)).unwrap();
        let mut found = Vec::new();
        for (weight, limit, reserve) in [(100, 100, 0), (300, 50, 0), (300, 25, 50)] {
            (spec.cpu.weight, spec.cpu.limit, spec.cpu.reserve) = (weight, limit, reserve);
            let applied = group.apply(&spec, 4);
            found.push((applied, read("cpu.weight"), read("cpu.max"), read("cgroup.procs")));
        }
        process.kill().unwrap();
        process.wait().unwrap();
        for path in [group.path(), &root.join(GROUP), &root] {
            std::fs::remove_dir(path).unwrap();
        }
        let pid = format!("{}\n", process.id());
        let expected =
            [("100\n", "max 100000\n"), ("300\n", "100000 100000\n"), ("2500\n", "50000 100000\n")];
        let expected = expected.map(|(weight, max)| (Ok(()), weight.to_owned(), max.to_owned(), pid.clone()));
        assert_eq!(found, expected);
    }

    #[test]
    fn group_is_kept_to_processors_where_there_is_a_controller() {
        let root = hierarchy("cpuset cpu memory\n");
        let cgroups = Cgroups::below(root.path());
        assert_eq!(cgroups.no_cpuset(), None);
        let mut group = cgroups.group("web").unwrap();
        group.keep_to(&[0, 2]).unwrap();
        let file = group.path().join("cpuset.cpus");
        assert!(!file.exists() && group.kept_to().is_empty(), "a kernel's group has the file from the start");
        std::fs::write(&file, "").unwrap();
        group.keep_to(&[0, 2]).unwrap();
        assert_eq!(
            (std::fs::read_to_string(&file).unwrap().as_str(), group.kept_to()),
            ("0,2\n", &[0, 2][..])
        );
        std::fs::write(&file, "unlike").unwrap();
        group.keep_to(&[0, 2]).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "unlike", "it is not written again");
        group.keep_to(&[]).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "\n");
        std::fs::write(&file, "").unwrap();
        cgroups.group("web").unwrap().keep_to(&[]).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "", "what is empty is not emptied");
        let root = hierarchy("cpu memory\n");
        assert_eq!(Cgroups::below(root.path()).no_cpuset(), Some("the cpuset controller is not offered"));
        assert_eq!(Cgroups::none("a test").no_cpuset(), None, "that there are no groups says it all");
    }

    #[test]
    fn reserve_is_a_floor_under_the_weight() {
        let mut spec = spec("web");
        (spec.vcpus, spec.cpu.reserve) = (2, 50);
        assert_eq!(weight(&spec, 4), 2500);
        spec.cpu.weight = 5000;
        assert_eq!(weight(&spec, 4), 5000);
        (spec.vcpus, spec.cpu.reserve) = (64, 100);
        assert_eq!(weight(&spec, 1), 10_000);
        assert_eq!(limit(&spec), "max 100000");
    }

    #[test]
    fn host_without_the_controller_is_told_in_words() {
        let root = hierarchy("memory\n");
        let refused = Cgroups::below(root.path()).group("web").unwrap_err();
        assert!(refused.contains("the cpu controller is not offered"), "{refused}");
        assert!(Cgroups::below(Path::new("/nonexistent")).group("web").is_err());
        assert_eq!(mount("proc /proc proc rw 0 0\n"), None);
        assert_eq!(mount("a /x cgroup rw 0 0\nb /sys/fs/cgroup cgroup2 rw 0 0\n"), Some("/sys/fs/cgroup"));
    }
}
