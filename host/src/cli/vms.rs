//! `yard vm`: requests for virtual machines, from the words of the command line.

use std::path::Path;

use hyper::Method;
use serde_json::{Map, Value, json};

use super::client::{Client, part};
use super::console;
use super::failure::{Failure, exit};
use super::model::Vm;
use super::ports::{absolute, extra, port_change, put, vlan};
use super::run::{Session, print, unless};
use super::vm_args::{
    LinkWanted, NicAdd, NicCommand, NicType, Restart, ValueCommand, VmCommand, VmDefine, VmSet,
};
use super::vm_show;
use crate::config::{Machine, vm_definitions};

/// Runs a command.
pub(super) async fn run(session: &Session, command: VmCommand) -> Result<(), Failure> {
    let order =
        async |vm: &str, what: &str| session.order(Method::POST, &format!("{}/{what}", path(vm)), None).await;
    match command {
        VmCommand::Define(args) => define(session, &args).await,
        VmCommand::Start { vm } => order(&vm, "start").await,
        VmCommand::Shutdown { vm, reboot: true } => order(&vm, "shutdown?reboot=true").await,
        VmCommand::Shutdown { vm, reboot: false } => order(&vm, "shutdown").await,
        VmCommand::Stop { vm } => order(&vm, "stop").await,
        VmCommand::Pause { vm } => order(&vm, "pause").await,
        VmCommand::Resume { vm } => order(&vm, "resume").await,
        VmCommand::Reset { vm } => order(&vm, "reset").await,
        VmCommand::Freeze { vm } => order(&vm, "freeze").await,
        VmCommand::Thaw { vm } => order(&vm, "thaw").await,
        VmCommand::SyncTime { vm } => order(&vm, "sync-time").await,
        VmCommand::List if session.json => session.json("/v1/vms").await,
        VmCommand::List => {
            let vms: Vec<Vm> = session.client.get("/v1/vms").await?;
            print(&vm_show::list(&vms, session.colour))
        }
        VmCommand::Show { vm } if session.json => session.json(&path(&vm)).await,
        VmCommand::Show { vm } => {
            print(&vm_show::machine(&find(&session.client, &vm).await?, session.colour))
        }
        VmCommand::Console { vm } => console::attach(&find(&session.client, &vm).await?),
        VmCommand::Delete { vm, if_exists } => {
            unless(exit::NOT_FOUND, if_exists, session.order(Method::DELETE, &path(&vm), None).await)
        }
        VmCommand::Set(args) => session.order(Method::PATCH, &path(&args.vm), Some(change(&args))).await,
        VmCommand::Nic(command) => nic(session, command).await,
        VmCommand::Value(command) => value(session, command).await,
    }
}

fn path(vm: &str) -> String {
    format!("/v1/vms/{}", part(vm))
}

async fn find(client: &Client, vm: &str) -> Result<Vm, Failure> {
    client.get(&path(vm)).await
}

async fn define(session: &Session, args: &VmDefine) -> Result<(), Failure> {
    let requests = match &args.kernel {
        Some(kernel) => vec![request(args, kernel)?],
        None => {
            let read = vm_definitions(Path::new(&args.target), &Machine::this());
            read.map_err(|error| Failure::failed(error.to_string()))?
        }
    };
    for request in requests {
        let name = request.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
        let defined = session.order(Method::POST, "/v1/vms", Some(request)).await;
        unless(exit::EXISTS, args.may_exist, defined)?;
        if args.start {
            session.order(Method::POST, &format!("{}/start", path(&name)), None).await?;
        }
    }
    Ok(())
}

/// The request that the options make.
fn request(args: &VmDefine, kernel: &Path) -> Result<Value, Failure> {
    let mut body = extra(args.with.as_deref())?;
    body.insert("name".into(), json!(args.target));
    body.insert("kernel".into(), json!(absolute(kernel)?));
    put(&mut body, "initrd", args.initrd.as_deref().map(absolute).transpose()?);
    let mut memory = Map::new();
    put(&mut memory, "startup", args.memory.as_ref());
    put(&mut memory, "minimum", args.minimum.as_ref());
    put(&mut memory, "maximum", args.maximum.as_ref());
    put(&mut memory, "huge", args.huge.then_some(true));
    body.insert("memory".into(), memory.into());
    put(&mut body, "vcpus", args.vcpus);
    put(&mut body, "cmdline", args.cmdline.as_ref());
    put(&mut body, "cpu", args.baseline.as_ref().map(|baseline| json!({ "baseline": baseline })));
    let restart = args.restart.map(|restart| match restart {
        Restart::Never => "never",
        Restart::OnCrash => "on-crash",
        Restart::Always => "always",
    });
    put(&mut body, "restart", restart);
    let nics = args.nic.iter().map(|words| nic_words(words)).collect::<Result<Vec<_>, _>>()?;
    put(&mut body, "nic", Some(nics).filter(|nics| !nics.is_empty()));
    Ok(body.into())
}

/// An adapter of `name=eth0,switch=lab,access=10`; what a value means, the daemon knows.
fn nic_words(words: &str) -> Result<Value, Failure> {
    let mut body = Map::new();
    for word in words.split(',') {
        let Some((key, value)) = word.split_once('=') else {
            return Err(Failure::usage(format!("--nic: found {word:?}, expected KEY=VALUE,...")));
        };
        let read = match (value.parse::<u64>(), value) {
            (Ok(number), _) => json!(number),
            (_, "true" | "false") => json!(value == "true"),
            _ => json!(value),
        };
        match key {
            "access" => body.insert("vlan".into(), json!({ "access": read })),
            // A name may be all digits.
            "name" | "switch" => body.insert(key.into(), json!(value)),
            _ => body.insert(key.into(), read),
        };
    }
    Ok(body.into())
}

fn change(args: &VmSet) -> Value {
    let mut body = Map::new();
    put(&mut body, "memory", args.memory.as_ref());
    let mut cpu = Map::new();
    put(&mut cpu, "weight", args.cpu_weight);
    put(&mut cpu, "limit", args.cpu_limit);
    put(&mut cpu, "reserve", args.cpu_reserve);
    put(&mut body, "cpu", Some(cpu).filter(|cpu| !cpu.is_empty()));
    body.into()
}

async fn nic(session: &Session, command: NicCommand) -> Result<(), Failure> {
    match command {
        NicCommand::Add(args) => {
            let body = new_nic(&args)?;
            session.order(Method::POST, &format!("{}/nics", path(&args.vm)), Some(body)).await
        }
        NicCommand::Remove { vm, nic } => {
            session.order(Method::DELETE, &format!("{}/nics/{}", path(&vm), part(&nic)), None).await
        }
        NicCommand::Set { vm, nic, mac, link, change } => {
            let mut body = port_change(&change)?;
            put(&mut body, "mac", mac);
            put(&mut body, "link", link.map(|link| if link == LinkWanted::Up { "up" } else { "down" }));
            let path = format!("{}/nics/{}", path(&vm), part(&nic));
            session.order(Method::PATCH, &path, Some(body.into())).await
        }
    }
}

fn new_nic(args: &NicAdd) -> Result<Value, Failure> {
    let mut body = extra(args.with.as_deref())?;
    body.insert("name".into(), json!(args.nic));
    body.insert("switch".into(), json!(args.switch));
    let kind = match args.kind {
        NicType::Synthetic => "synthetic",
        NicType::Legacy => "legacy",
    };
    body.insert("type".into(), json!(kind));
    put(&mut body, "mac", args.mac.as_ref());
    put(&mut body, "queues", args.queues);
    put(&mut body, "mtu", args.mtu);
    put(&mut body, "mac-spoofing", args.mac_spoofing.then_some(true));
    put(&mut body, "vlan", vlan(args.vlan.access, args.vlan.trunk.as_deref(), args.vlan.native));
    Ok(body.into())
}

async fn value(session: &Session, command: ValueCommand) -> Result<(), Failure> {
    let at = |vm: &str, key: &str| format!("{}/values/{}", path(vm), part(key));
    match command {
        ValueCommand::Show { vm } => {
            let vm = find(&session.client, &vm).await?;
            match session.json {
                true => print(&format!("{:#}\n", json!(vm.guest.values))),
                false => print(&vm_show::values(&vm, session.colour)),
            }
        }
        ValueCommand::Set { vm, key, value } => {
            session.order(Method::PUT, &at(&vm, &key), Some(json!({ "value": value }))).await
        }
        ValueCommand::Remove { vm, key } => session.order(Method::DELETE, &at(&vm, &key), None).await,
    }
}
