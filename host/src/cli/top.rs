//! `stats` and `top`: tables that come again.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::args::{StatsArgs, TopArgs};
use super::client::Client;
use super::failure::Failure;
use super::model::{Port, Report};
use super::rates::{Sample, port_rates, queue_rates};
use super::run::print;
use super::show::{drop_table, ports};
use super::table::{Cell, Table, short_count};

async fn sample(client: &Client) -> Result<Sample, Failure> {
    let report = client.get("/v1/report").await?;
    Ok(Sample { time: Instant::now(), report })
}

/// Which ports a `SWITCH[/PORT]` means.
#[derive(Debug)]
struct Target<'a>(Option<(&'a str, Option<&'a str>)>);

impl<'a> Target<'a> {
    fn parse(text: Option<&'a str>) -> Self {
        Self(text.map(|text| match text.split_once('/') {
            Some((switch, port)) => (switch, Some(port)),
            None => (text, None),
        }))
    }

    fn includes(&self, switch: &str, port: &str) -> bool {
        self.0.is_none_or(|(wanted, name)| wanted == switch && name.is_none_or(|name| name == port))
    }

    fn check(&self, report: &Report) -> Result<(), Failure> {
        let Some((switch, port)) = self.0 else { return Ok(()) };
        let found = report.switches.iter().find(|found| found.name == switch);
        match (found, port) {
            (None, _) => Err(Failure::not_found(format!("there is no switch `{switch}`"))),
            (Some(found), Some(port)) if !found.ports.iter().any(|other| other.name == port) => {
                Err(Failure::not_found(format!("there is no port `{switch}/{port}`")))
            }
            _ => Ok(()),
        }
    }
}

/// `yard stats`: totals once, or rates again and again.
pub async fn stats(client: &Client, args: &StatsArgs, colour: bool) -> Result<(), Failure> {
    let target = Target::parse(args.target.as_deref());
    let mut before = sample(client).await?;
    target.check(&before.report)?;
    let Some(seconds) = args.watch else {
        return print(&totals(&before.report, &target, colour));
    };
    let mut ending = Ending::new()?;
    let mut shown = 0;
    while args.count.is_none_or(|count| shown < count) {
        if ending.wait(Duration::from_secs(seconds.into())).await {
            break;
        }
        let after = sample(client).await?;
        let table = port_rates(&before, &after, |switch, port| target.includes(switch, port), colour);
        print(&format!("{}{table}", if shown > 0 { "\n" } else { "" }))?;
        before = after;
        shown += 1;
    }
    Ok(())
}

fn totals(report: &Report, target: &Target<'_>, colour: bool) -> String {
    let wanted: Vec<(String, &Port)> = ports(report)
        .filter(|(switch, port)| target.includes(&switch.name, &port.name))
        .map(|(switch, port)| (format!("{}/{}", switch.name, port.name), port))
        .collect();
    let mut table = Table::new(&["PORT", "IN", "IN BYTES", "OUT", "OUT BYTES", "DROPPED", "INTERRUPTS"]);
    for (name, port) in &wanted {
        table.row([
            Cell::text(name),
            Cell::number(port.received.frames),
            Cell::number(short_count(port.received.bytes)),
            Cell::number(port.sent.frames),
            Cell::number(short_count(port.sent.bytes)),
            Cell::number(port.received.dropped() + port.sent.dropped()),
            Cell::number(port.received.calls + port.sent.calls),
        ]);
    }
    let drops = drop_table(wanted.iter().map(|(name, port)| (name.as_str(), *port)), colour);
    format!("{}{drops}", table.render("", colour))
}

/// `yard top`.
pub async fn top(client: &Client, args: &TopArgs, colour: bool) -> Result<(), Failure> {
    let mut before = sample(client).await?;
    let mut ending = Ending::new()?;
    let screen = Screen::open()?;
    let mut shown = 0;
    let mut wait = Duration::from_millis(200);
    while args.count.is_none_or(|count| shown < count) {
        if ending.wait(wait).await {
            break;
        }
        wait = Duration::from_secs(args.interval.into());
        let after = sample(client).await?;
        screen.draw(&page(&before, &after, colour))?;
        before = after;
        shown += 1;
    }
    Ok(())
}

fn page(before: &Sample, after: &Sample, colour: bool) -> String {
    let workers: Vec<_> = after
        .report
        .workers
        .iter()
        .map(|worker| format!("cpu {} {} {}%", worker.cpu, worker.state, worker.load_permille / 10))
        .collect();
    let ports = port_rates(before, after, |_, _| true, colour);
    let queues = queue_rates(before, after, colour);
    format!("yard top: {}\n\n{ports}\n{queues}", workers.join(", "))
}

/// The terminal's other screen, without cursor and line wrap, while it is open; plain output elsewhere.
struct Screen {
    terminal: bool,
}

impl Screen {
    fn open() -> Result<Self, Failure> {
        let terminal = std::io::stdout().is_terminal();
        if terminal {
            print("\x1b[?1049h\x1b[?25l\x1b[?7l")?;
        }
        Ok(Self { terminal })
    }

    /// Replaces what is shown; lines that do not fit are left out, as they would scroll the head away.
    fn draw(&self, page: &str) -> Result<(), Failure> {
        if !self.terminal {
            return print(&format!("{page}\n"));
        }
        let size = rustix::termios::tcgetwinsize(std::io::stdout());
        let rows = size.map_or(24, |size| usize::from(size.ws_row)).max(2);
        let lines: Vec<_> = page.lines().take(rows - 1).collect();
        print(&format!("\x1b[H{}\x1b[K\r\n\x1b[J", lines.join("\x1b[K\r\n")))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if self.terminal {
            let mut out = std::io::stdout();
            let _ = out.write_all(b"\x1b[?7h\x1b[?25h\x1b[?1049l").and_then(|()| out.flush());
        }
    }
}

/// SIGINT and SIGTERM, which end a command in good order.
#[derive(Debug)]
pub struct Ending {
    interrupt: Signal,
    terminate: Signal,
}

impl Ending {
    pub fn new() -> Result<Self, Failure> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Ends when a signal comes.
    pub async fn come(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }

    /// Sleeps; true if a signal came before it was over.
    async fn wait(&mut self, time: Duration) -> bool {
        tokio::time::timeout(time, self.come()).await.is_ok()
    }
}
