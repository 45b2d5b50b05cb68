//! DPDK's testpmd: a packet generator over virtio-user ports, or a switch of vhost ports that only copies.
//!
//! It runs on 2 MiB huge pages that nobody else sees (`--in-memory`): no hugetlbfs mount, nothing left behind.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::lab::{Lab, serial, wait_for};
use crate::nic::Role;
use crate::process::{Process, command_on};
use crate::testpmd_stats::{PortStats, Rate, parse, rate};

const PROMPT: &str = "testpmd> ";
const LIMIT: Duration = Duration::from_secs(30);
/// Huge pages of 2 MiB that one testpmd takes with the default [`TestpmdSpec::memory_mb`].
pub const HUGE_PAGES: usize = 256;

/// What testpmd does with what it receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forward {
    /// Sends it out of the other port, to the other port's peer (addresses are rewritten).
    Mac,
    /// Sends it out of the other port unchanged.
    Io,
    /// Swaps its addresses and sends it back.
    MacSwap,
    /// Drops it; sends packets of its own.
    TxOnly,
    /// Drops and counts it.
    RxOnly,
    /// Sends packets of many flows of its own.
    FlowGen,
    /// Checksums in software or by offload, as `csum set` commands say.
    Checksum,
}

impl Forward {
    fn name(self) -> &'static str {
        match self {
            Self::Mac => "mac",
            Self::Io => "io",
            Self::MacSwap => "macswap",
            Self::TxOnly => "txonly",
            Self::RxOnly => "rxonly",
            Self::FlowGen => "flowgen",
            Self::Checksum => "csum",
        }
    }
}

/// A virtio-user port: the driver's side of a vhost-user socket.
#[derive(Debug, Clone)]
pub struct VirtioUser {
    /// The socket.
    pub path: PathBuf,
    /// testpmd's role.
    pub role: Role,
    /// Its address.
    pub mac: String,
    /// Queue pairs.
    pub queues: u16,
    /// Descriptors in each ring.
    pub queue_size: u16,
    /// Packed rings.
    pub packed: bool,
    /// Mergeable receive buffers.
    pub mergeable: bool,
    /// VIRTIO_F_IN_ORDER.
    pub in_order: bool,
}

impl VirtioUser {
    /// A client port with one queue pair, split rings of 1024, mergeable buffers, in order (DPDK's defaults).
    pub fn new(path: impl AsRef<Path>, mac: &str) -> Self {
        Self {
            path: path.as_ref().to_path_buf(),
            role: Role::Client,
            mac: mac.to_owned(),
            queues: 1,
            queue_size: 1024,
            packed: false,
            mergeable: true,
            in_order: true,
        }
    }

    fn argument(&self, index: usize) -> String {
        let server = if self.role == Role::Server { ",server=1" } else { "" };
        format!(
            "--vdev=net_virtio_user{index},path={},mac={},queues={},queue_size={},packed_vq={},mrg_rxbuf={},in_order={}{server}",
            self.path.display(),
            self.mac,
            self.queues,
            self.queue_size,
            u8::from(self.packed),
            u8::from(self.mergeable),
            u8::from(self.in_order),
        )
    }
}

/// How to run testpmd as a client.
#[derive(Debug, Clone)]
pub struct TestpmdSpec {
    /// Its ports; each sends to the next of its pair (0 ↔ 1, 2 ↔ 3).
    pub ports: Vec<VirtioUser>,
    /// What it does.
    pub forward: Forward,
    /// The host's processor it polls on.
    pub cpu: usize,
    /// The longest frame it takes; above 1518, its buffers grow.
    pub max_frame: u32,
    /// Memory in MiB, all of it on huge pages.
    pub memory_mb: u32,
    /// More of testpmd's own options.
    pub arguments: Vec<String>,
}

impl TestpmdSpec {
    /// `mac` forwarding between these ports on processor 0.
    pub fn new(ports: Vec<VirtioUser>) -> Self {
        Self { ports, forward: Forward::Mac, cpu: 0, max_frame: 1518, memory_mb: 512, arguments: Vec::new() }
    }

    /// A pair of client ports 02:…:0a and 02:…:0b on one polling processor, between two switch ports.
    pub fn pair(a: impl AsRef<Path>, b: impl AsRef<Path>) -> Self {
        Self::new(vec![VirtioUser::new(a, "02:00:00:00:00:0a"), VirtioUser::new(b, "02:00:00:00:00:0b")])
    }

    fn arguments(&self) -> Vec<String> {
        let queues = self.ports.iter().map(|port| port.queues).max().unwrap_or(1);
        let descriptors = self.ports.iter().map(|port| port.queue_size).max().unwrap_or(1024);
        let buffers = 8192 * self.ports.len() * usize::from(queues);
        let mut arguments = eal_arguments(self.cpu, self.memory_mb);
        arguments.extend(self.ports.iter().enumerate().map(|(index, port)| port.argument(index)));
        arguments.extend(["--".to_owned(), "-i".to_owned(), "--nb-cores=1".to_owned()]);
        arguments.push(format!("--forward-mode={}", self.forward.name()));
        arguments.extend([format!("--rxq={queues}"), format!("--txq={queues}")]);
        arguments.extend([format!("--rxd={descriptors}"), format!("--txd={descriptors}")]);
        arguments.push(format!("--total-num-mbufs={buffers}"));
        for (index, port) in self.ports.iter().enumerate() {
            if let (Some(_), peer) = (self.ports.get(index ^ 1), index ^ 1) {
                arguments.push(format!("--eth-peer={peer},{}", port.mac));
            }
        }
        if self.max_frame > 1518 {
            arguments.push(format!("--mbuf-size={}", (self.max_frame + 600).next_multiple_of(64)));
            arguments.push(format!("--max-pkt-len={}", self.max_frame + 200));
        }
        arguments.extend(self.arguments.iter().cloned());
        arguments
    }
}

/// Options of DPDK's environment layer. The main thread only waits for commands, so it shares the processor.
fn eal_arguments(cpu: usize, memory_mb: u32) -> Vec<String> {
    let fixed = ["--no-pci", "--in-memory", "--single-file-segments", "--no-telemetry"];
    let mut arguments = vec![format!("--lcores=0@{cpu},1@{cpu}"), "-m".to_owned(), memory_mb.to_string()];
    arguments.extend(fixed.map(str::to_owned));
    arguments
}

/// A running testpmd; killed when dropped.
#[derive(Debug)]
pub struct Testpmd {
    process: Process,
}

impl Testpmd {
    /// Starts a client and waits for its prompt. Nothing is forwarded yet.
    pub fn start(lab: &Lab, spec: &TestpmdSpec) -> Result<Self> {
        for port in spec.ports.iter().filter(|port| port.role == Role::Server) {
            // DPDK does not listen on a path that exists.
            let _ = std::fs::remove_file(&port.path);
        }
        let testpmd = Self::launch(lab, spec.cpu, &spec.arguments())?;
        if testpmd.process.log().contains("probe failed") {
            bail!("testpmd has not all its ports:\n{}", testpmd.process.log());
        }
        Ok(testpmd)
    }

    /// Starts testpmd as a *switch* that copies between two vhost ports and looks at nothing: DPDK's own
    /// ceiling. It listens on both sockets, polls on `cpu`, and forwards at once.
    pub fn vhost_io(lab: &Lab, sockets: [&Path; 2], cpu: usize, max_frame: u32) -> Result<Self> {
        let mut arguments = eal_arguments(cpu, 512);
        for socket in sockets {
            // DPDK does not listen on a path that exists; a switch that was killed leaves its own behind.
            let _ = std::fs::remove_file(socket);
        }
        for (index, socket) in sockets.iter().enumerate() {
            arguments.push(format!("--vdev=net_vhost{index},iface={},queues=1", socket.display()));
        }
        let own = ["--", "-i", "--nb-cores=1", "--forward-mode=io", "--total-num-mbufs=16384"];
        arguments.extend(own.map(str::to_owned));
        if max_frame > 1518 {
            arguments.push(format!("--mbuf-size={}", (max_frame + 600).next_multiple_of(64)));
            arguments.push(format!("--max-pkt-len={}", max_frame + 200));
        }
        let mut testpmd = Self::launch(lab, cpu, &arguments)?;
        for socket in sockets {
            testpmd.process.wait_for_socket(socket, LIMIT)?;
        }
        testpmd.command("start")?;
        Ok(testpmd)
    }

    fn launch(lab: &Lab, cpu: usize, arguments: &[String]) -> Result<Self> {
        // Unbuffered, or its answers would stay in the C library's buffer.
        let mut command: Command = command_on(&[cpu], "stdbuf");
        command.args(["-o0", "dpdk-testpmd"]).args(arguments);
        let process = Process::spawn("testpmd", command, lab.path(&format!("testpmd-{}.log", serial())))?;
        let mut testpmd = Self { process };
        testpmd.wait_for_prompt(0)?;
        Ok(testpmd)
    }

    /// Sends one command; what testpmd answers.
    pub fn command(&mut self, line: &str) -> Result<String> {
        let before = self.process.log().len();
        self.process.write(&format!("{line}\n"))?;
        let answer = self.wait_for_prompt(before)?;
        if answer.contains("Bad arguments") || answer.contains("Command not found") {
            bail!("testpmd refused {line:?}: {answer}");
        }
        Ok(answer)
    }

    fn wait_for_prompt(&mut self, from: usize) -> Result<String> {
        let mut answer = String::new();
        let process = &mut self.process;
        let waited = wait_for("testpmd's prompt", LIMIT, || {
            process.expect_running()?;
            answer = process.log().get(from..).unwrap_or_default().to_owned();
            // A command's echo ends in a newline, so a lone prompt is not its answer.
            Ok(answer.contains('\n') && answer.ends_with(PROMPT))
        });
        waited.with_context(|| process.log_tail(20))?;
        Ok(answer)
    }

    /// Lets packets circulate between a pair of [`Forward::Mac`] ports: `bursts` × 32 from each, of `frame`
    /// bytes without frame check sequence. Packets that the switch drops are not replaced, so this first
    /// waits until a few come through in both directions: switches drop all until they are set up.
    pub fn start_loop(&mut self, frame: u32, bursts: u32) -> Result<()> {
        self.command(&format!("set txpkts {frame}"))?;
        let deadline = Instant::now() + LIMIT;
        while !self.try_loop()? {
            if Instant::now() > deadline {
                bail!("no packet comes through the switch:\n{}", self.process.log_tail(30));
            }
        }
        self.command(&format!("start tx_first {bursts}")).map(drop)
    }

    fn try_loop(&mut self) -> Result<bool> {
        self.command("start tx_first 1")?;
        std::thread::sleep(Duration::from_millis(100));
        let before = self.stats()?;
        std::thread::sleep(Duration::from_millis(100));
        let after = self.stats()?;
        self.command("stop")?;
        Ok(before.iter().zip(&after).all(|(before, after)| after.rx_packets > before.rx_packets))
    }

    /// Starts forwarding.
    pub fn forward(&mut self) -> Result<()> {
        self.command("start").map(drop)
    }

    /// Stops forwarding; the summary.
    pub fn stop(&mut self) -> Result<String> {
        self.command("stop")
    }

    /// The counters of its ports.
    pub fn stats(&mut self) -> Result<Vec<PortStats>> {
        let stats = parse(&self.command("show port stats all")?);
        if stats.is_empty() {
            bail!("testpmd printed no statistics");
        }
        Ok(stats)
    }

    /// The rate of what it receives, all ports added, over `window`.
    pub fn measure(&mut self, window: Duration) -> Result<Rate> {
        let before = (Instant::now(), self.stats()?);
        std::thread::sleep(window);
        let after = (Instant::now(), self.stats()?);
        Ok(rate(&before.1, &after.1, after.0 - before.0))
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Ends it in good order: the sockets are closed as a driver closes them.
    pub fn quit(mut self) -> Result<()> {
        self.process.write("stop\nquit\n")?;
        self.process.wait(LIMIT).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pair_sends_to_each_other() {
        let mut spec = TestpmdSpec::pair("/a", "/b");
        spec.ports[0].packed = true;
        spec.max_frame = 9000;
        let arguments = spec.arguments();
        assert!(arguments.contains(&"--eth-peer=0,02:00:00:00:00:0b".to_owned()));
        assert!(arguments.contains(&"--eth-peer=1,02:00:00:00:00:0a".to_owned()));
        assert!(
            arguments
                .iter()
                .any(|argument| argument.contains("path=/a,") && argument.contains("packed_vq=1"))
        );
        assert!(arguments.contains(&"--mbuf-size=9600".to_owned()));
    }

    #[test]
    fn lone_port_has_no_peer() {
        let spec = TestpmdSpec::new(vec![VirtioUser::new("/a", "02:00:00:00:00:0a")]);
        assert!(!spec.arguments().iter().any(|argument| argument.contains("eth-peer")));
    }
}
