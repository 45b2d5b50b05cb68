//! The requests about virtual machines, one function each.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::{MethodRouter, delete, get, patch, post, put};
use hypervisor::control::Command;
use serde::Deserialize;
use serde_json::Value;
use std::sync::Arc;

use super::handlers::{Answer, Asked, Document, Named, Shared, created};
use super::{Api, Failure, Kind};
use crate::config::{self, Machine};
use crate::vm::{Manager, VmError};

/// Every address with its method.
pub(super) fn routes() -> Vec<(&'static str, &'static str, MethodRouter<Arc<Api>>)> {
    vec![
        ("get", "/v1/vms", get(list)),
        ("post", "/v1/vms", post(define)),
        ("get", "/v1/vms/{vm}", get(show)),
        ("patch", "/v1/vms/{vm}", patch(change)),
        ("delete", "/v1/vms/{vm}", delete(forget)),
        ("post", "/v1/vms/{vm}/start", order(Manager::start)),
        ("post", "/v1/vms/{vm}/stop", order(Manager::stop)),
        ("post", "/v1/vms/{vm}/shutdown", post(shutdown)),
        ("post", "/v1/vms/{vm}/pause", order(|vms, vm| vms.command(vm, Command::Pause))),
        ("post", "/v1/vms/{vm}/resume", order(|vms, vm| vms.command(vm, Command::Resume))),
        ("post", "/v1/vms/{vm}/reset", order(|vms, vm| vms.command(vm, Command::Reset))),
        ("post", "/v1/vms/{vm}/freeze", order(|vms, vm| vms.command(vm, Command::Freeze))),
        ("post", "/v1/vms/{vm}/thaw", order(|vms, vm| vms.command(vm, Command::Thaw))),
        ("post", "/v1/vms/{vm}/sync-time", order(|vms, vm| vms.command(vm, Command::SyncTime))),
        ("post", "/v1/vms/{vm}/nics", post(add_nic)),
        ("patch", "/v1/vms/{vm}/nics/{nic}", patch(change_nic)),
        ("delete", "/v1/vms/{vm}/nics/{nic}", delete(remove_nic)),
        ("put", "/v1/vms/{vm}/values/{key}", put(set_value)),
        ("delete", "/v1/vms/{vm}/values/{key}", delete(remove_value)),
    ]
}

/// A request that names a VM and says nothing more.
fn order(work: fn(&Manager, &str) -> Result<(), VmError>) -> MethodRouter<Arc<Api>> {
    post(move |State(api): Shared, Named(vm): Named<String>| async move {
        api.with_vms(move |vms| work(vms, &vm)).await?;
        Ok::<_, Failure>(StatusCode::NO_CONTENT)
    })
}

async fn list(State(api): Shared) -> Answer {
    Ok(Json(api.look_at_vms(Manager::list).await?).into_response())
}

async fn show(State(api): Shared, Named(vm): Named<String>) -> Answer {
    Ok(Json(api.with_vms(move |vms| vms.show(&vm)).await?).into_response())
}

async fn define(State(api): Shared, Document(json): Document) -> Answer {
    let spec = config::vm_request(json, &Machine::this().cpus)?;
    let made = api
        .with_vms(move |vms| {
            let name = spec.name.clone();
            vms.define(spec)?;
            vms.show(&name)
        })
        .await?;
    Ok(created(format!("/v1/vms/{}", made.name), Json(made)))
}

async fn change(State(api): Shared, Named(vm): Named<String>, Document(json): Document) -> Answer {
    let change = config::vm_change_request(json)?;
    let changed = api
        .with_vms(move |vms| {
            vms.set(&vm, change)?;
            vms.show(&vm)
        })
        .await?;
    Ok(Json(changed).into_response())
}

async fn forget(State(api): Shared, Named(vm): Named<String>) -> Answer {
    api.with_vms(move |vms| vms.delete(&vm)).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ShutdownAsked {
    #[serde(default)]
    reboot: bool,
}

async fn shutdown(
    State(api): Shared,
    Named(vm): Named<String>,
    Asked(asked): Asked<ShutdownAsked>,
) -> Answer {
    let command = Command::Shutdown { reboot: asked.reboot };
    api.with_vms(move |vms| vms.command(&vm, command)).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn add_nic(State(api): Shared, Named(vm): Named<String>, Document(json): Document) -> Answer {
    let nic = config::nic_request(json, &vm)?;
    let (name, made) = api
        .with_vms(move |vms| {
            let name = nic.name.clone();
            vms.add_nic(&vm, nic)?;
            Ok::<_, VmError>((name, vms.show(&vm)?))
        })
        .await?;
    Ok(created(format!("/v1/vms/{}/nics/{name}", made.name), Json(made)))
}

async fn change_nic(
    State(api): Shared,
    Named((vm, nic)): Named<(String, String)>,
    Document(json): Document,
) -> Answer {
    let change = config::nic_change_request(json)?;
    let changed = api
        .with_vms(move |vms| {
            vms.change_nic(&vm, &nic, change)?;
            vms.show(&vm)
        })
        .await?;
    Ok(Json(changed).into_response())
}

async fn remove_nic(State(api): Shared, Named((vm, nic)): Named<(String, String)>) -> Answer {
    api.with_vms(move |vms| vms.remove_nic(&vm, &nic)).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Longest key and value of the data exchange, with their final zeros (`HV_KVP_EXCHANGE_MAX_KEY_SIZE` and `_VALUE_SIZE` of
/// include/uapi/linux/hyperv.h, in bytes of UTF-16).
const MAX_KEY: usize = 512 / 2 - 1;
const MAX_VALUE: usize = 2048 / 2 - 1;

/// `{"value": "text"}`.
async fn set_value(
    State(api): Shared,
    Named((vm, key)): Named<(String, String)>,
    Document(json): Document,
) -> Answer {
    let Some(value) = json.get("value").and_then(Value::as_str) else {
        return Err(Failure::new(Kind::Invalid, "value: is missing, expected a text"));
    };
    write_value(&api, vm, key, Some(value.to_owned())).await
}

async fn remove_value(State(api): Shared, Named((vm, key)): Named<(String, String)>) -> Answer {
    write_value(&api, vm, key, None).await
}

async fn write_value(api: &Arc<Api>, vm: String, key: String, value: Option<String>) -> Answer {
    let long = |text: &str, most| text.encode_utf16().count() > most || text.contains('\0');
    if key.is_empty() || long(&key, MAX_KEY) {
        return Err(Failure::new(Kind::Invalid, format!("key: expected 1 to {MAX_KEY} characters")));
    }
    if value.as_deref().is_some_and(|value| long(value, MAX_VALUE)) {
        return Err(Failure::new(Kind::Invalid, format!("value: expected at most {MAX_VALUE} characters")));
    }
    api.with_vms(move |vms| vms.command(&vm, Command::SetValue { key, value })).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}
