//! What ends a measurement.

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The front end or the back end failed.
    #[error("the session with the back end failed")]
    Session(#[from] lanefsd_frontend::Error),
    /// A system call failed.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: String,
        /// The host's error.
        source: std::io::Error,
    },
    /// A request was answered with something else than success.
    #[error("{operation}, request {step} of it: {problem}")]
    Answer {
        /// The operation that is measured.
        operation: &'static str,
        /// Which of its requests, counted from 0.
        step: usize,
        /// What came.
        problem: String,
    },
    /// The options contradict each other.
    #[error("{0}")]
    Options(String),
    /// The back end stopped answering.
    #[error("queue threads still wait for answers {0} seconds after the end")]
    Stuck(u64),
    /// The report is no JSON.
    #[error("cannot print the report")]
    Print(#[from] serde_json::Error),
}

/// Result of this program's calls.
pub type Result<T> = std::result::Result<T, LoadError>;

impl LoadError {
    /// Makes a [`LoadError::System`]; for `map_err`.
    pub fn system<E: Into<std::io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> LoadError {
        let what = what.into();
        move |source| LoadError::System { what, source: source.into() }
    }
}
