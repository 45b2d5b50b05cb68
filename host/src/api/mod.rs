//! The REST API: version 1, on a Unix socket. `docs/operators/openapi.json` is the contract; a test compares it with
//! [`routes`].

mod backend;
mod capture;
mod failure;
mod handlers;
mod metrics;
mod server;
mod vms;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::routing::{MethodRouter, delete, get, patch, post, put};
use tokio::sync::Semaphore;

use crate::vm::Manager;

pub use backend::{Backend, Outcome, Recording};
pub use failure::{Failure, Kind};
pub use server::{BindError, Listener, serve};

/// The contract of the API.
pub const OPENAPI: &str = include_str!("../../../docs/operators/openapi.json");

/// Looks at all virtual machines at once.
const LOOKS: usize = 4;

/// What clients cannot exceed, so that none of them keeps others from the daemon.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections served at once; others wait in the socket's queue.
    pub connections: usize,
    /// Captures that run at once.
    pub captures: usize,
    /// Orders to virtual machines that are carried out at once. Each may wait for its guest.
    pub orders: usize,
    /// Bytes of a request's body.
    pub body: usize,
    /// Time for a request's head.
    pub head_time: Duration,
    /// Time for a request's body.
    pub body_time: Duration,
    /// Time for everything on a connection, captures excepted.
    pub exchange_time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            captures: 16,
            orders: 8,
            body: 1 << 20,
            head_time: Duration::from_secs(5),
            body_time: Duration::from_secs(10),
            exchange_time: Duration::from_secs(60),
        }
    }
}

/// What the handlers share.
pub struct Api {
    backend: Arc<dyn Backend>,
    vms: Arc<Manager>,
    limits: Limits,
    captures: Arc<Semaphore>,
    orders: Arc<Semaphore>,
    looks: Arc<Semaphore>,
    stopping: AtomicBool,
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl Api {
    /// An API over a switch and its virtual machines.
    pub fn new(backend: Arc<dyn Backend>, vms: Arc<Manager>, limits: Limits) -> Arc<Self> {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        let (captures, orders, looks) =
            (semaphore(limits.captures), semaphore(limits.orders), semaphore(LOOKS));
        Arc::new(Self { backend, vms, limits, captures, orders, looks, stopping: AtomicBool::new(false) })
    }

    /// Captures end, each with its statistics.
    fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Does `work` on a thread that may block.
    async fn blocking<T, E, F>(self: &Arc<Self>, work: F) -> Result<T, Failure>
    where
        T: Send + 'static,
        E: Into<Failure> + Send + 'static,
        F: FnOnce(&dyn Backend) -> Result<T, E> + Send + 'static,
    {
        let api = Arc::clone(self);
        wait_for(move || work(api.backend.as_ref()).map_err(Into::into)).await
    }

    /// Does `work` with the virtual machines on a thread that may block, if not too many do already: the threads are
    /// the switch's as well.
    async fn with_vms<T, E, F>(self: &Arc<Self>, work: F) -> Result<T, Failure>
    where
        T: Send + 'static,
        E: Into<Failure> + Send + 'static,
        F: FnOnce(&Manager) -> Result<T, E> + Send + 'static,
    {
        let Ok(permit) = Arc::clone(&self.orders).try_acquire_owned() else {
            let most = self.limits.orders;
            let detail = format!("{most} orders to virtual machines are being carried out; try again");
            return Err(Failure::new(Kind::Busy, detail));
        };
        let api = Arc::clone(self);
        wait_for(move || {
            // Held also when the client has gone.
            let _permit = permit;
            work(&api.vms).map_err(Into::into)
        })
        .await
    }

    /// Does `work`, which waits for no guest, with the virtual machines; after others, if there are many.
    async fn look_at_vms<T, F>(self: &Arc<Self>, work: F) -> Result<T, Failure>
    where
        T: Send + 'static,
        F: FnOnce(&Manager) -> T + Send + 'static,
    {
        let permit = Arc::clone(&self.looks).acquire_owned().await;
        let api = Arc::clone(self);
        wait_for(move || {
            let _permit = permit;
            Ok(work(&api.vms))
        })
        .await
    }
}

/// Does `work` on a thread that may block.
async fn wait_for<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        // The fault is logged by the panic hook; the client learns that it was not its own.
        Err(_) => Err(Failure::new(Kind::Failed, "the daemon has a bug: see its log")),
    }
}

/// Every address with its method.
pub fn routes() -> Vec<(&'static str, &'static str, MethodRouter<Arc<Api>>)> {
    use handlers as h;
    let mut routes = vec![
        ("get", "/v1/version", get(h::version)),
        ("get", "/v1/openapi.json", get(h::openapi)),
        ("get", "/v1/report", get(h::report)),
        ("get", "/v1/metrics", get(metrics::metrics)),
        ("get", "/v1/switches", get(h::list_switches)),
        ("post", "/v1/switches", post(h::add_switch)),
        ("get", "/v1/switches/{switch}", get(h::show_switch)),
        ("delete", "/v1/switches/{switch}", delete(h::remove_switch)),
        ("get", "/v1/switches/{switch}/ports", get(h::list_ports)),
        ("post", "/v1/switches/{switch}/ports", post(h::add_port)),
        ("get", "/v1/switches/{switch}/ports/{port}", get(h::show_port)),
        ("patch", "/v1/switches/{switch}/ports/{port}", patch(h::change_port)),
        ("delete", "/v1/switches/{switch}/ports/{port}", delete(h::remove_port)),
        ("post", "/v1/switches/{switch}/ports/{port}/restart", post(h::restart_port)),
        ("put", "/v1/switches/{switch}/ports/{port}/queues/{queue}/pin", put(h::pin_queue)),
        ("get", "/v1/switches/{switch}/addresses", get(h::list_addresses)),
        ("post", "/v1/switches/{switch}/addresses", post(h::add_address)),
        ("delete", "/v1/switches/{switch}/addresses", delete(h::flush_addresses)),
        ("delete", "/v1/switches/{switch}/addresses/{mac}", delete(h::remove_address)),
        ("get", "/v1/switches/{switch}/capture", get(capture::capture)),
    ];
    routes.extend(vms::routes());
    routes
}

/// The API as a service.
pub fn router(api: Arc<Api>) -> Router {
    routes()
        .into_iter()
        .fold(Router::new(), |router, (_, path, handler)| router.route(path, handler))
        .fallback(h_no_route)
        .method_not_allowed_fallback(h_method)
        .with_state(api)
}

async fn h_no_route(uri: axum::http::Uri) -> Failure {
    let path = uri.path().escape_debug().take(200).collect::<String>();
    Failure::new(Kind::NoRoute, format!("there is no {path}; /v1/openapi.json lists what there is"))
}

async fn h_method(method: axum::http::Method) -> Failure {
    Failure::new(Kind::Method, format!("{method} is not possible here; /v1/openapi.json lists what is"))
}
