//! One command from its words to its exit status.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::Parser;
use hyper::Method;
use serde_json::{Value, json};

use super::args::{Command, FdbCommand, PortCommand, PortName, QueueCommand, SwitchCommand, Yard};
use super::client::{Client, part};
use super::failure::{Failure, exit};
use super::model::{Addresses, Flushed, Port, Report, Switch, Version};
use super::table::{colour, plain};
use super::vm_args::VmCommand;
use super::{capture, manual, ports, show, top, vms};
use crate::config::DEFAULT_SOCKET;

/// Runs `yard` with the words of its command line; returns the exit status.
pub fn main(words: impl IntoIterator<Item = OsString>) -> u8 {
    let yard = match Yard::try_parse_from(words) {
        Ok(yard) => yard,
        Err(error) => {
            // Help and version are no failures, and go to standard output.
            let _ = error.print();
            return u8::try_from(error.exit_code()).unwrap_or(exit::USAGE);
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&Failure::failed(error.to_string())),
    };
    match runtime.block_on(run(yard)) {
        Ok(()) => exit::OK,
        Err(failure) => report(&failure),
    }
}

fn report(failure: &Failure) -> u8 {
    for (index, line) in failure.text.lines().enumerate() {
        eprintln!("{}{}", if index == 0 { "yard: " } else { "      " }, plain(line));
    }
    failure.status
}

/// Writes to standard output. Nobody reading any more is no failure.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// How answers are shown.
pub(super) struct Session {
    pub(super) client: Client,
    pub(super) json: bool,
    pub(super) colour: bool,
}

async fn run(yard: Yard) -> Result<(), Failure> {
    let from_environment = || std::env::var_os("YARD_SOCKET").filter(|path| !path.is_empty());
    let socket = yard.socket.or_else(|| from_environment().map(PathBuf::from));
    let session = Session {
        client: Client::new(socket.unwrap_or_else(|| DEFAULT_SOCKET.into())),
        json: yard.json,
        colour: colour(),
    };
    let live = match &yard.command {
        Command::Top(_) | Command::Capture(_) | Command::Vm(VmCommand::Console { .. }) => true,
        Command::Stats(args) => args.watch.is_some(),
        _ => false,
    };
    if live && session.json {
        return Err(Failure::usage("--json gives one answer of the API; this command shows more than one"));
    }
    match yard.command {
        Command::Show => session.show().await,
        Command::Switch(command) => session.switch(command).await,
        Command::Port(command) => session.port(command).await,
        Command::Fdb(command) => session.fdb(command).await,
        Command::Queue(command) => session.queue(command).await,
        Command::Vm(command) => vms::run(&session, command).await,
        Command::Stats(_) if session.json => session.json("/v1/report").await,
        Command::Stats(args) => top::stats(&session.client, &args, session.colour).await,
        Command::Top(args) => top::top(&session.client, &args, session.colour).await,
        Command::Capture(args) => capture::capture(&session.client, &args).await,
        Command::Completions { shell } => print(&manual::completions(shell)),
        Command::Man { dir } => {
            manual::write_pages(&dir).map_err(|error| Failure::failed(format!("{}: {error}", dir.display())))
        }
    }
}

/// Address of a port.
fn port_path(name: &PortName) -> String {
    format!("/v1/switches/{}/ports/{}", part(&name.switch), part(&name.port))
}

/// A failure of `status` is none.
pub(super) fn unless(status: u8, tolerated: bool, outcome: Result<(), Failure>) -> Result<(), Failure> {
    outcome.or_else(|failure| if tolerated && failure.status == status { Ok(()) } else { Err(failure) })
}

impl Session {
    /// Prints the answer as it is.
    pub(super) async fn json(&self, path: &str) -> Result<(), Failure> {
        let answer: Value = self.client.get(path).await?;
        print(&format!("{answer:#}\n"))
    }

    /// A request whose answer matters to programs only.
    pub(super) async fn order(&self, method: Method, path: &str, body: Option<Value>) -> Result<(), Failure> {
        let answer = self.client.request(method, path, body.as_ref()).await?;
        match serde_json::from_slice::<Value>(&answer) {
            Ok(answer) if self.json => print(&format!("{answer:#}\n")),
            _ => Ok(()),
        }
    }

    async fn show(&self) -> Result<(), Failure> {
        if self.json {
            return self.json("/v1/report").await;
        }
        let version: Version = self.client.get("/v1/version").await?;
        let report: Report = self.client.get("/v1/report").await?;
        let socket = self.client.socket().display().to_string();
        print(&show::everything(&version, &socket, &report, self.colour))
    }

    async fn switch(&self, command: SwitchCommand) -> Result<(), Failure> {
        match command {
            SwitchCommand::Add(args) => {
                let body = ports::new_switch(&args);
                unless(
                    exit::EXISTS,
                    args.may_exist,
                    self.order(Method::POST, "/v1/switches", Some(body)).await,
                )
            }
            SwitchCommand::Del { switch, if_exists } => {
                let path = format!("/v1/switches/{}", part(&switch));
                unless(exit::NOT_FOUND, if_exists, self.order(Method::DELETE, &path, None).await)
            }
            SwitchCommand::List if self.json => self.json("/v1/switches").await,
            SwitchCommand::List => {
                let switches: Vec<Switch> = self.client.get("/v1/switches").await?;
                print(&show::switch_list(&switches, self.colour))
            }
        }
    }

    async fn port(&self, command: PortCommand) -> Result<(), Failure> {
        match command {
            PortCommand::Add(args) => {
                let path = format!("/v1/switches/{}/ports", part(&args.port.switch));
                let body = ports::new_port(&args)?;
                unless(exit::EXISTS, args.may_exist, self.order(Method::POST, &path, Some(body)).await)
            }
            PortCommand::Del { port, if_exists } => {
                let gone = self.order(Method::DELETE, &port_path(&port), None).await;
                unless(exit::NOT_FOUND, if_exists, gone)
            }
            PortCommand::List { switch } => self.list_ports(switch.as_deref()).await,
            PortCommand::Show { port } if self.json => self.json(&port_path(&port)).await,
            PortCommand::Show { port } => {
                let found: Port = self.client.get(&port_path(&port)).await?;
                print(&show::port(&port.switch, &found, self.colour))
            }
            PortCommand::Set(args) => {
                let body = ports::port_change(&args.change)?.into();
                self.order(Method::PATCH, &port_path(&args.port), Some(body)).await
            }
            PortCommand::Restart { port } => {
                self.order(Method::POST, &format!("{}/restart", port_path(&port)), None).await
            }
        }
    }

    async fn list_ports(&self, switch: Option<&str>) -> Result<(), Failure> {
        match switch {
            Some(name) if self.json => self.json(&format!("/v1/switches/{}/ports", part(name))).await,
            Some(name) => {
                let switch: Switch = self.client.get(&format!("/v1/switches/{}", part(name))).await?;
                print(&show::port_table([&switch], true, self.colour))
            }
            None if self.json => self.json("/v1/switches").await,
            None => {
                let switches: Vec<Switch> = self.client.get("/v1/switches").await?;
                print(&show::port_table(&switches, true, self.colour))
            }
        }
    }

    async fn fdb(&self, command: FdbCommand) -> Result<(), Failure> {
        let addresses = |switch: &str| format!("/v1/switches/{}/addresses", part(switch));
        match command {
            FdbCommand::Show { switch, port, limit } => {
                let mut path = format!("{}?limit={limit}", addresses(&switch));
                path.extend(port.map(|port| format!("&port={}", part(&port))));
                if self.json {
                    return self.json(&path).await;
                }
                let list: Addresses = self.client.get(&path).await?;
                print(&show::address_table(&list, self.colour))
            }
            FdbCommand::Flush { switch, port } => {
                let port = port.map(|port| format!("?port={}", part(&port))).unwrap_or_default();
                let path = format!("{}{port}", addresses(&switch));
                let answer = self.client.request(Method::DELETE, &path, None).await?;
                let flushed: Flushed = serde_json::from_slice(&answer).unwrap_or_default();
                print(&match self.json {
                    true => format!("{}\n", String::from_utf8_lossy(&answer)),
                    false => format!("{} addresses forgotten\n", flushed.flushed),
                })
            }
            FdbCommand::Add { port, mac, vlan } => {
                let body = json!({ "mac": mac, "vlan": vlan, "port": port.port });
                self.order(Method::POST, &addresses(&port.switch), Some(body)).await
            }
            FdbCommand::Del { switch, mac, vlan } => {
                let path = format!("{}/{}?vlan={vlan}", addresses(&switch), part(&mac));
                self.order(Method::DELETE, &path, None).await
            }
        }
    }

    async fn queue(&self, command: QueueCommand) -> Result<(), Failure> {
        match command {
            QueueCommand::Show { port: Some(name) } if self.json => {
                let port: Value = self.client.get(&port_path(&name)).await?;
                print(&format!("{:#}\n", port.get("queues").unwrap_or(&Value::Null)))
            }
            QueueCommand::Show { port: Some(name) } => {
                let port: Port = self.client.get(&port_path(&name)).await?;
                print(&show::queue_table([(name.to_string().as_str(), &port)], self.colour))
            }
            QueueCommand::Show { port: None } if self.json => self.json("/v1/report").await,
            QueueCommand::Show { port: None } => {
                let report: Report = self.client.get("/v1/report").await?;
                let named: Vec<_> = show::ports(&report)
                    .map(|(switch, port)| (format!("{}/{}", switch.name, port.name), port))
                    .collect();
                let named = named.iter().map(|(name, port)| (name.as_str(), *port));
                print(&show::queue_table(named, self.colour))
            }
            QueueCommand::Pin { port, queue, cpu } => {
                let path = format!("{}/queues/{queue}/pin", port_path(&port));
                self.order(Method::PUT, &path, Some(json!({ "cpu": cpu.0 }))).await
            }
        }
    }
}
