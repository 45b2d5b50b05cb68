//! Whether the host gives VMs the huge pages that workers ask for.

use std::path::PathBuf;

/// The kernel's policy for files in memory (`Documentation/admin-guide/mm/transhuge.rst`).
const POLICY: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Where the host's policy is read: its words, the chosen one in brackets.
#[derive(Debug)]
pub struct PagePolicy(PathBuf);

impl PagePolicy {
    /// Of this host.
    pub fn of_this_host() -> Self {
        Self::told_by(POLICY)
    }

    /// As a file tells; one that is not there has nothing to say.
    pub fn told_by(file: impl Into<PathBuf>) -> Self {
        Self(file.into())
    }

    /// Why VMs get small pages, in words for the operator. `None` if they do not, or if the kernel has no others.
    pub fn why_small(&self) -> Option<String> {
        let policy = std::fs::read_to_string(&self.0).ok()?;
        let chosen = policy.split(['[', ']']).nth(1)?;
        let file = self.0.display();
        matches!(chosen, "never" | "deny").then(|| {
            format!(
                "VMs start in small pages, each of which costs an exit when it is touched first: {file} is `{chosen}`, \
                 expected `advise`"
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
        PagePolicy::told_by(file.path()).why_small()
    }

    #[test]
    fn operator_is_told_of_small_pages_and_what_to_do() {
        for chosen in ["never", "deny"] {
            let told = told(&format!("always within_size advise [{chosen}] force\n")).unwrap();
            assert!(told.contains(&format!("is `{chosen}`")) && told.contains("`advise`"), "{told}");
        }
    }

    #[test]
    fn host_that_gives_huge_pages_where_asked_or_has_none_is_left_in_peace() {
        assert_eq!(told("always within_size [advise] never deny force\n"), None);
        assert_eq!(told(""), None);
        assert_eq!(PagePolicy::told_by("/nowhere").why_small(), None);
    }
}
