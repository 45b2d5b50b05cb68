//! The socket: who may connect, how many at once, and for how long.
//!
//! A connection carries one request. That keeps the limits simple: a client that sends its head slowly, its body slowly,
//! or never reads the answer, holds one of [`Limits::connections`](super::Limits) for a bounded time.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::{Api, Limits, router};

/// Who may use the API: the daemon's user and group.
const MODE: u32 = 0o660;
/// After a failure to accept (no descriptors left), the next attempt.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// What requests under way get when the daemon ends.
const FAREWELL: Duration = Duration::from_secs(2);

/// Why there is no socket.
#[derive(Debug, Error)]
pub enum BindError {
    /// Somebody answers there.
    #[error("{path}: another yardd answers there; stop it, or choose another api.socket")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// What is there is no socket, and not ours to remove.
    #[error("{path}: exists and is no socket; remove it, or choose another api.socket")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("{path}: cannot be made: {source}")]
    Io {
        /// The path.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
}

/// The bound socket; it is removed when this is dropped.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
    inode: u64,
}

impl Listener {
    /// Listens at `path`, whose directory is made if it is missing. A socket that a killed daemon left is replaced. Must
    /// be called within a runtime.
    ///
    /// # Errors
    /// If another daemon answers there, or the system refuses.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let failed = |source| BindError::Io { path: path.to_owned(), source };
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
        match std::fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(BindError::NotASocket { path: path.to_owned() });
            }
            Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
                return Err(BindError::InUse { path: path.to_owned() });
            }
            _ => {}
        }
        // It gets its mode under another name, so that nobody whom the mode excludes can connect in between.
        let mut name = path.as_os_str().to_owned();
        name.push("~");
        let hidden = PathBuf::from(name);
        let _ = std::fs::remove_file(&hidden);
        let listener = UnixListener::bind(&hidden).map_err(failed)?;
        let placed = std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(MODE))
            .and_then(|()| std::fs::rename(&hidden, path))
            .and_then(|()| Ok(std::fs::symlink_metadata(path)?.ino()));
        match placed {
            Ok(inode) => Ok(Self { listener, path: path.to_owned(), inode }),
            Err(error) => {
                let _ = std::fs::remove_file(&hidden);
                Err(failed(error))
            }
        }
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // A daemon that took the place meanwhile keeps its socket.
        if std::fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Marks a connection as a stream without end, which no deadline cuts.
#[derive(Debug, Clone, Default)]
pub(super) struct Streaming(Arc<AtomicBool>);

impl Streaming {
    pub fn begin(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Serves until `stop` becomes true, then lets what is under way end.
pub async fn serve(listener: Listener, api: Arc<Api>, mut stop: watch::Receiver<bool>) {
    let limits = api.limits;
    let router = router(Arc::clone(&api));
    let places = Arc::new(Semaphore::new(limits.connections));
    let mut connections = JoinSet::new();
    loop {
        let next = async {
            // Whoever finds no place waits in the socket's own queue.
            let place = Arc::clone(&places).acquire_owned().await;
            (place, listener.listener.accept().await)
        };
        tokio::select! {
            () = stopped(&mut stop) => break,
            Some(_) = connections.join_next() => {}
            (place, accepted) = next => match accepted {
                Ok((stream, _)) => {
                    let served = connection(stream, router.clone(), limits);
                    connections.spawn(async move {
                        let _place = place;
                        served.await;
                    });
                }
                Err(error) => {
                    tracing::warn!("the API cannot accept a connection: {error}");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            },
        }
    }
    drop(listener);
    api.stop();
    let all = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(FAREWELL, all).await;
}

/// Ends when the daemon is to end.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    // Nobody being left to say so means the same.
    let _ = stop.wait_for(|&stop| stop).await;
}

async fn connection(stream: UnixStream, router: Router, limits: Limits) {
    let streaming = Streaming::default();
    let mark = streaming.clone();
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(mark.clone());
        router.call(request)
    });
    let exchange = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_time)
        .keep_alive(false)
        .max_buf_size(64 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // A client that goes away or speaks no HTTP is nobody's concern.
        _ = exchange => {}
        () = deadline(limits.exchange_time, &streaming) => {}
    }
}

/// Ends when the time of an exchange is over; never for a stream.
async fn deadline(time: Duration, streaming: &Streaming) {
    tokio::time::sleep(time).await;
    if streaming.0.load(Ordering::Relaxed) {
        std::future::pending::<()>().await;
    }
}
