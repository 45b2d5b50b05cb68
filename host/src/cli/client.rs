//! One request a connection, over the daemon's Unix socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;

use super::failure::Failure;

/// The daemon answers at once; what takes longer is a fault.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longest answer that is read into memory: a table of a million addresses fits.
const MAX_ANSWER: usize = 256 << 20;

/// Where the daemon listens.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What `GET path` gives.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        let answer = self.request(Method::GET, path, None).await?;
        serde_json::from_slice(&answer).map_err(|error| {
            Failure::failed(format!(
                "the answer to {path} cannot be read: {error}; are yard and yardd of one version?"
            ))
        })
    }

    /// The whole answer to a request; empty if it has none.
    pub async fn request(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Bytes, Failure> {
        let whole = async {
            let response = self.send(method, path, body).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
            let body = body.map_err(|error| Failure::silent(&self.socket, &format!("broke off: {error}")))?;
            let body = body.to_bytes();
            if status.is_success() { Ok(body) } else { Err(Failure::refused(status, &body)) }
        };
        match tokio::time::timeout(PATIENCE, whole).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Failure::silent(&self.socket, &format!("did not answer within {PATIENCE:?}"))),
        }
    }

    /// The answer as it comes, if it is a success.
    pub async fn stream(&self, path: &str) -> Result<Incoming, Failure> {
        let response = match tokio::time::timeout(PATIENCE, self.send(Method::GET, path, None)).await {
            Ok(response) => response?,
            Err(_) => {
                return Err(Failure::silent(&self.socket, &format!("did not answer within {PATIENCE:?}")));
            }
        };
        let status = response.status();
        if status.is_success() {
            return Ok(response.into_body());
        }
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        Err(Failure::refused(status, &body.map(|body| body.to_bytes()).unwrap_or_default()))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Response<Incoming>, Failure> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| Failure::unreachable(&self.socket, &error))?;
        let broken = |error: hyper::Error| Failure::silent(&self.socket, &format!("broke off: {error}"));
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // It ends with the exchange; its failure shows in the answer.
        tokio::spawn(connection);
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "yardd")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| Failure::usage(format!("{path}: {error}")))?;
        sender.send_request(request).await.map_err(broken)
    }
}

/// `name` as one part of an address: whatever the operator typed stays one part.
pub fn part(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'~' => out.push(char::from(byte)),
            // A lone dot would be taken for the directory.
            b'.' if name.bytes().any(|other| other != b'.') => out.push('.'),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_with_slashes_and_dots_stays_one_part() {
        assert_eq!(part("red-1.a_b"), "red-1.a_b");
        assert_eq!(part("../x?y#z é"), "..%2Fx%3Fy%23z%20%C3%A9");
        assert_eq!(part(".."), "%2E%2E");
    }
}
