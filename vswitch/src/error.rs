//! What can go wrong when an operator asks for something.

/// Why a request was refused.
#[derive(Debug, thiserror::Error)]
pub enum FabricError {
    /// The switch, port, queue, address or processor named does not exist.
    #[error("there is no {what} `{name}`")]
    NotFound {
        /// `switch`, `port`, …
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// Something of that name exists already.
    #[error("{what} `{name}` exists already")]
    Exists {
        /// `switch`, `port`, …
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// The port waits for its disk on behalf of somebody else.
    #[error("port `{port}` is being started already, and its disk has yet to answer")]
    Starting {
        /// Its name.
        port: String,
    },
    /// A value is out of range or contradicts another.
    #[error("{key}: {problem}")]
    Invalid {
        /// The key as in the configuration file, such as `mtu` or `vlan.access`.
        key: &'static str,
        /// What is wrong and what was expected.
        problem: String,
    },
    /// The host refused something.
    #[error("{doing}: {source}")]
    Failed {
        /// What was being done, with the object's name.
        doing: String,
        /// The reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl FabricError {
    /// A refusal by the host while `doing` something.
    pub fn failed(
        doing: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Failed { doing: doing.into(), source: source.into() }
    }

    /// `key`'s value does not do.
    pub fn invalid(key: &'static str, problem: impl Into<String>) -> Self {
        Self::Invalid { key, problem: problem.into() }
    }
}
