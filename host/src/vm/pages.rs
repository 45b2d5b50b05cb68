//! Whether the host gives VMs huge pages of its own accord, which workers ask for.

use std::path::PathBuf;

/// The kernel's policy for files in memory (`Documentation/admin-guide/mm/transhuge.rst`).
const POLICY: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Where the host's policy is read: its words, the chosen one in brackets.
#[derive(Debug)]
pub struct Pages(PathBuf);

impl Pages {
    /// This host's policy.
    pub fn of_this_host() -> Self {
        Self::told_by(POLICY)
    }

    /// The policy in a file; one that is not there has nothing to say.
    pub fn told_by(file: impl Into<PathBuf>) -> Self {
        Self(file.into())
    }

    /// Why VMs' memory is in small pages, in words for the operator. `None` if it is not, or if the kernel has no others.
    pub fn small(&self) -> Option<String> {
        let policy = std::fs::read_to_string(&self.0).ok()?;
        let chosen = policy.split(['[', ']']).nth(1)?;
        let file = self.0.display();
        matches!(chosen, "never" | "deny").then(|| {
            format!(
                "VMs' memory is in small pages, which makes them slow: {file} is `{chosen}`; with `echo advise > {file}` VMs \
                 get huge ones from their next start"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(policy: &str) -> Option<String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, policy).unwrap();
        Pages::told_by(file.path()).small()
    }

    #[test]
    fn operator_is_told_of_small_pages_and_what_to_do() {
        for chosen in ["never", "deny"] {
            let told = told(&format!("always within_size advise [{chosen}] force\n")).unwrap();
            assert!(told.contains(&format!("is `{chosen}`")) && told.contains("echo advise"), "{told}");
        }
    }

    #[test]
    fn host_that_gives_huge_pages_where_asked_or_has_none_is_left_in_peace() {
        assert_eq!(told("always within_size [advise] never deny force\n"), None);
        assert_eq!(told(""), None);
        assert_eq!(Pages::told_by("/nowhere").small(), None);
    }
}
