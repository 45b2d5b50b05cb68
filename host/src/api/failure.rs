//! Failed requests: `application/problem+json` of RFC 9457, with a `kind` that programs can branch on.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use vswitch::error::FabricError;

use crate::config::{ConfigError, Problem};
use crate::vm::VmError;

/// Why a request failed.
#[derive(Debug)]
pub struct Failure {
    kind: Kind,
    detail: String,
    problems: Vec<Problem>,
}

/// The kinds of failure; each has one status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The body is no JSON, or a parameter of the address is wrong.
    BadRequest,
    /// A switch, port, queue or address does not exist.
    NotFound,
    /// The address is none of the API's.
    NoRoute,
    /// The address does not take this method.
    Method,
    /// The body did not come in time.
    Timeout,
    /// Something of that name exists.
    Exists,
    /// The VM or the port is in another state than the request needs.
    State,
    /// The body is too long.
    TooLarge,
    /// A value is out of range or contradicts another.
    Invalid,
    /// The host refused, or the daemon has a bug.
    Failed,
    /// Too many captures, or orders to virtual machines, run already.
    Busy,
}

impl Kind {
    /// Name, status and title.
    fn describe(self) -> (&'static str, StatusCode, &'static str) {
        match self {
            Self::BadRequest => ("bad-request", StatusCode::BAD_REQUEST, "the request cannot be read"),
            Self::NotFound => ("not-found", StatusCode::NOT_FOUND, "no such thing"),
            Self::NoRoute => ("no-route", StatusCode::NOT_FOUND, "no such address"),
            Self::Method => ("method", StatusCode::METHOD_NOT_ALLOWED, "method not allowed here"),
            Self::Timeout => ("timeout", StatusCode::REQUEST_TIMEOUT, "the request came too slowly"),
            Self::Exists => ("exists", StatusCode::CONFLICT, "exists already"),
            Self::State => ("state", StatusCode::CONFLICT, "not in this state"),
            Self::TooLarge => ("too-large", StatusCode::PAYLOAD_TOO_LARGE, "the request is too long"),
            Self::Invalid => ("invalid", StatusCode::UNPROCESSABLE_ENTITY, "a value does not do"),
            Self::Failed => ("failed", StatusCode::INTERNAL_SERVER_ERROR, "the host refused"),
            Self::Busy => ("busy", StatusCode::SERVICE_UNAVAILABLE, "too many at once"),
        }
    }
}

impl Failure {
    /// A failure in the words of `detail`.
    pub fn new(kind: Kind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into(), problems: Vec::new() }
    }
}

impl From<FabricError> for Failure {
    fn from(error: FabricError) -> Self {
        let kind = match error {
            FabricError::NotFound { .. } => Kind::NotFound,
            FabricError::Exists { .. } => Kind::Exists,
            FabricError::Starting { .. } => Kind::State,
            FabricError::Invalid { .. } => Kind::Invalid,
            FabricError::Failed { .. } => Kind::Failed,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<VmError> for Failure {
    fn from(error: VmError) -> Self {
        let kind = match &error {
            VmError::NotFound { .. } => Kind::NotFound,
            VmError::State { .. } => Kind::State,
            VmError::Invalid { .. } => Kind::Invalid,
            VmError::Port { source: FabricError::Invalid { .. }, .. } => Kind::Invalid,
            VmError::Port { source: FabricError::NotFound { .. }, .. } => Kind::NotFound,
            error if error.is_exists() => Kind::Exists,
            VmError::Exists { .. }
            | VmError::Port { .. }
            | VmError::Io { .. }
            | VmError::Refused(_)
            | VmError::Silent { .. }
            | VmError::Ending => Kind::Failed,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self { kind: Kind::Invalid, detail: error.to_string(), problems: error.problems }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let (name, status, title) = self.kind.describe();
        let mut body = json!({
            "type": format!("urn:switchyard:{name}"),
            "title": title,
            "status": status.as_u16(),
            "kind": name,
            "detail": self.detail,
        });
        if let (false, Some(object)) = (self.problems.is_empty(), body.as_object_mut()) {
            object.insert("problems".into(), json!(self.problems));
        }
        let kind = HeaderValue::from_static("application/problem+json");
        (status, [(header::CONTENT_TYPE, kind)], body.to_string()).into_response()
    }
}
