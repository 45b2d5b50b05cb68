//! The requests, one function each.

use std::sync::Arc;

use axum::Json;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request, State};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use vmq::Mac;
use vswitch::error::FabricError;
use vswitch::report::{FabricReport, PortReport, SwitchReport};

use super::{Api, Backend, Failure, Kind, OPENAPI};
use crate::config;

pub(super) type Shared = State<Arc<Api>>;
pub(super) type Answer = Result<Response, Failure>;

/// Parts of the address; what cannot be read is a [`Failure`].
#[derive(Debug)]
pub(super) struct Named<T>(pub T);

/// Parameters after the question mark.
#[derive(Debug)]
pub(super) struct Asked<T>(pub T);

impl<T: DeserializeOwned + Send> FromRequestParts<Arc<Api>> for Named<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, Failure> {
        let path = Path::from_request_parts(parts, api).await;
        path.map(|Path(names)| Self(names))
            .map_err(|rejection| Failure::new(Kind::BadRequest, rejection.body_text()))
    }
}

impl<T: DeserializeOwned + Send> FromRequestParts<Arc<Api>> for Asked<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, Failure> {
        let query = Query::from_request_parts(parts, api).await;
        query
            .map(|Query(asked)| Self(asked))
            .map_err(|rejection| Failure::new(Kind::BadRequest, rejection.body_text()))
    }
}

/// A request's JSON body, bounded in length and time.
#[derive(Debug)]
pub(super) struct Document(pub Value);

impl FromRequest<Arc<Api>> for Document {
    type Rejection = Failure;

    async fn from_request(request: Request, api: &Arc<Api>) -> Result<Self, Failure> {
        let limit = api.limits.body;
        let too_large = || Failure::new(Kind::TooLarge, format!("the body is longer than {limit} bytes"));
        let announced = request.headers().get(header::CONTENT_LENGTH);
        let announced = announced.and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
        if announced.is_some_and(|length| length > limit) {
            return Err(too_large());
        }
        let body = Limited::new(request.into_body(), limit).collect();
        let body = match tokio::time::timeout(api.limits.body_time, body).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(too_large()),
            Ok(Err(error)) => {
                return Err(Failure::new(Kind::BadRequest, format!("the body broke off: {error}")));
            }
            Err(_) => {
                let waited = api.limits.body_time;
                return Err(Failure::new(Kind::Timeout, format!("the body did not come within {waited:?}")));
            }
        };
        let json = serde_json::from_slice(&body);
        json.map(Self)
            .map_err(|error| Failure::new(Kind::BadRequest, format!("the body is no JSON: {error}")))
    }
}

pub(super) async fn version() -> Json<Value> {
    Json(json!({ "name": "yardd", "version": env!("CARGO_PKG_VERSION"), "api": "v1" }))
}

pub(super) async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI).into_response()
}

pub(super) async fn report(State(api): Shared) -> Answer {
    let report = api.blocking(|backend| Ok::<_, Failure>(backend.report())).await?;
    let (vms, warnings) = api.look_at_vms(|vms| (vms.list(), vms.warnings())).await?;
    let FabricReport { switches, workers } = report;
    let report = json!({ "switches": switches, "workers": workers, "vms": vms, "warnings": warnings });
    Ok(Json(report).into_response())
}

pub(super) async fn list_switches(State(api): Shared) -> Answer {
    let report = api.blocking(|backend| Ok::<_, Failure>(backend.report())).await?;
    Ok(Json(report.switches).into_response())
}

pub(super) async fn show_switch(State(api): Shared, Named(switch): Named<String>) -> Answer {
    Ok(Json(api.blocking(move |backend| find_switch(backend, &switch)).await?).into_response())
}

pub(super) async fn add_switch(State(api): Shared, Document(json): Document) -> Answer {
    let made = api
        .blocking(move |backend| {
            let cpus = processors(&backend.report());
            let wanted = config::switch_request(json, &cpus)?;
            let name = wanted.switch.name.clone();
            backend.add_switch(wanted.switch)?;
            for port in wanted.ports {
                if let Err(error) = backend.add_port(&name, port) {
                    // A switch is made with all its ports, or not at all.
                    backend.remove_switch(&name)?;
                    return Err(error.into());
                }
            }
            Ok::<_, Failure>(find_switch(backend, &name)?)
        })
        .await?;
    Ok(created(format!("/v1/switches/{}", made.name), Json(made)))
}

pub(super) async fn remove_switch(State(api): Shared, Named(switch): Named<String>) -> Answer {
    api.blocking(move |backend| backend.remove_switch(&switch)).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

pub(super) async fn list_ports(State(api): Shared, Named(switch): Named<String>) -> Answer {
    let switch = api.blocking(move |backend| find_switch(backend, &switch)).await?;
    Ok(Json(switch.ports).into_response())
}

pub(super) async fn show_port(State(api): Shared, Named((switch, port)): Named<(String, String)>) -> Answer {
    Ok(Json(api.blocking(move |backend| find_port(backend, &switch, &port)).await?).into_response())
}

pub(super) async fn add_port(
    State(api): Shared,
    Named(switch): Named<String>,
    Document(json): Document,
) -> Answer {
    let (switch, made) = api
        .blocking(move |backend| {
            let report = backend.report();
            let cpus = processors(&report);
            let kind = pick_switch(report, &switch)?.kind;
            let port = config::port_request(json, kind, &cpus)?;
            let name = port.name.clone();
            backend.add_port(&switch, port)?;
            let made = find_port(backend, &switch, &name)?;
            Ok::<_, Failure>((switch, made))
        })
        .await?;
    Ok(created(format!("/v1/switches/{switch}/ports/{}", made.name), Json(made)))
}

pub(super) async fn change_port(
    State(api): Shared,
    Named((switch, port)): Named<(String, String)>,
    Document(json): Document,
) -> Answer {
    let change = config::change_request(json)?;
    let changed = api
        .blocking(move |backend| {
            backend.change_port(&switch, &port, change)?;
            find_port(backend, &switch, &port)
        })
        .await?;
    Ok(Json(changed).into_response())
}

pub(super) async fn remove_port(
    State(api): Shared,
    Named((switch, port)): Named<(String, String)>,
) -> Answer {
    api.blocking(move |backend| backend.remove_port(&switch, &port)).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

pub(super) async fn restart_port(
    State(api): Shared,
    Named((switch, port)): Named<(String, String)>,
) -> Answer {
    let (switch, port) =
        api.blocking(move |backend| backend.restart_port(&switch, &port).map(|()| (switch, port))).await?;
    // An emulated adapter's socket went with the port's old life; its VM makes another.
    api.look_at_vms(move |vms| vms.reconnect(&switch, &port)).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

pub(super) async fn pin_queue(
    State(api): Shared,
    Named((switch, port, queue)): Named<(String, String, u16)>,
    Document(json): Document,
) -> Answer {
    let cpu = config::pin_request(json)?;
    api.blocking(move |backend| backend.pin_queue(&switch, &port, queue, cpu)).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AddressesAsked {
    port: Option<String>,
    limit: Option<usize>,
}

/// Addresses listed unless asked for more: a table may hold a million.
const LISTED_ADDRESSES: usize = 10_000;

pub(super) async fn list_addresses(
    State(api): Shared,
    Named(switch): Named<String>,
    Asked(asked): Asked<AddressesAsked>,
) -> Answer {
    let limit = asked.limit.unwrap_or(LISTED_ADDRESSES);
    let json = api
        .blocking(move |backend| {
            let list = backend.addresses(&switch, asked.port.as_deref(), limit)?;
            // Here, too: it may take as long as the listing.
            let json = serde_json::to_vec(&list);
            json.map_err(|error| FabricError::failed("listing the addresses", error))
        })
        .await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], json).into_response())
}

pub(super) async fn add_address(
    State(api): Shared,
    Named(switch): Named<String>,
    Document(json): Document,
) -> Answer {
    let asked = config::address_request(json)?;
    api.blocking(move |backend| backend.add_address(&switch, &asked.port, asked.mac, asked.vlan)).await?;
    Ok(StatusCode::CREATED.into_response())
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FlushAsked {
    port: Option<String>,
}

pub(super) async fn flush_addresses(
    State(api): Shared,
    Named(switch): Named<String>,
    Asked(asked): Asked<FlushAsked>,
) -> Answer {
    let count = api.blocking(move |backend| backend.flush(&switch, asked.port.as_deref())).await?;
    Ok(Json(json!({ "flushed": count })).into_response())
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VlanAsked {
    #[serde(default)]
    vlan: u16,
}

pub(super) async fn remove_address(
    State(api): Shared,
    Named((switch, mac)): Named<(String, String)>,
    Asked(asked): Asked<VlanAsked>,
) -> Answer {
    let mac: Mac = mac.parse().map_err(|error| Failure::new(Kind::BadRequest, format!("{error}")))?;
    api.blocking(move |backend| backend.remove_address(&switch, mac, asked.vlan)).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

pub(super) fn created(location: String, body: impl IntoResponse) -> Response {
    (StatusCode::CREATED, [(header::LOCATION, location)], body).into_response()
}

/// Processors of the workers.
fn processors(report: &FabricReport) -> Vec<usize> {
    report.workers.iter().map(|worker| worker.cpu).collect()
}

fn pick_switch(report: FabricReport, name: &str) -> Result<SwitchReport, FabricError> {
    let found = report.switches.into_iter().find(|switch| switch.name == name);
    found.ok_or_else(|| FabricError::NotFound { what: "switch", name: name.to_owned() })
}

fn find_switch(backend: &dyn Backend, name: &str) -> Result<SwitchReport, FabricError> {
    pick_switch(backend.report(), name)
}

fn find_port(backend: &dyn Backend, switch: &str, name: &str) -> Result<PortReport, FabricError> {
    let found = find_switch(backend, switch)?.ports.into_iter().find(|port| port.name == name);
    found.ok_or_else(|| FabricError::NotFound { what: "port", name: format!("{switch}/{name}") })
}
