//! Guests on private switches, in VLANs and private VLANs: what must be seen is seen, and nothing else.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use switchyard_tests::kernel::Flavour;
use switchyard_tests::lab::wait_for;
use switchyard_tests::nested::scene::BOOT;
use switchyard_tests::nested::{Guest, Namespace, VmNic, VmSpec, scene};
use switchyard_tests::ping::{Ping, ping};
use switchyard_tests::station::{Job, Station};
use switchyard_tests::transfer::transfer;

const LIMIT: Duration = Duration::from_secs(120);
const START: Duration = Duration::from_secs(40);

/// A network of two guests, each with one adapter in it; the subnet is 10.4.N.0/24.
struct Network {
    number: u8,
    /// Switches of the adapters of a and b.
    switches: [&'static str; 2],
    /// Settings of the adapters of a and b.
    settings: [&'static str; 2],
    /// Witnesses beside a and beside b: TAP ports, and settings of them.
    witnesses: [&'static str; 2],
}

const OPEN: Network =
    Network { number: 0, switches: ["lab", "lab"], settings: ["", ""], witnesses: ["", ""] };
const VLANS: Network = Network {
    number: 1,
    switches: ["vlans", "vlans"],
    settings: ["vlan = { access = 10 }", "vlan = { access = 20 }"],
    witnesses: ["vlan = { access = 10 }", "vlan = { access = 20 }"],
};
const ISOLATED: Network = Network {
    number: 2,
    switches: ["isolated", "isolated"],
    settings: ["private = \"isolated\"", "private = \"isolated\""],
    witnesses: ["", ""],
};
const COMMUNITIES: Network = Network {
    number: 3,
    switches: ["communities", "communities"],
    settings: ["private = 1", "private = 2"],
    witnesses: ["private = 1", "private = 2"],
};
const APART: Network =
    Network { number: 4, switches: ["left", "right"], settings: ["", ""], witnesses: ["", ""] };
const NETWORKS: [&Network; 5] = [&OPEN, &VLANS, &ISOLATED, &COMMUNITIES, &APART];

impl Network {
    fn nic(&self, end: u8) -> VmNic {
        let index = usize::from(end - 1);
        let nic = VmNic::new(&format!("eth{}", self.number), self.switches[index], &self.mac(end));
        VmNic { settings: self.settings[index].to_owned(), ..nic }.at(&format!("{}/24", self.address(end)))
    }

    fn mac(&self, end: u8) -> String {
        format!("02:00:00:04:{:02x}:{end:02x}", self.number)
    }

    fn address(&self, end: u8) -> String {
        format!("10.4.{}.{end}", self.number)
    }

    /// The TAP device of the witness beside a guest.
    fn tap(&self, end: u8) -> String {
        format!("w{}{end}", self.number)
    }

    /// The witness ports of a switch.
    fn ports(&self) -> String {
        let port = |end: u8| {
            let index = usize::from(end - 1);
            let (switch, tap) = (self.switches[index], self.tap(end));
            let settings = self.witnesses[index];
            format!("[switch.{switch}.port.{tap}]\ntap = {{ name = \"{tap}\" }}\n{settings}\n")
        };
        port(1) + &port(2)
    }

    /// The guest's interface in this network.
    fn card(&self, guest: &Guest, end: u8) -> Result<String> {
        let line = format!("grep -l {} /sys/class/net/*/address", self.mac(end));
        let found = guest.check(&line, LIMIT)?;
        match found.split('/').nth(4) {
            Some(card) => Ok(card.to_owned()),
            None => bail!("no card: {found}"),
        }
    }
}

fn config() -> String {
    let mut config = String::new();
    for switch in ["lab", "vlans", "isolated", "communities", "left", "right", "elsewhere"] {
        config.push_str(&format!("[switch.{switch}]\ntype = \"private\"\n"));
    }
    NETWORKS.iter().for_each(|network| config.push_str(&network.ports()));
    config.push_str("[switch.elsewhere.port.spy]\ntap = { name = \"spy\" }\n");
    for (name, end) in [("a", 1), ("b", 2)] {
        let vm = VmSpec { flavour: Flavour::Cloud, ..VmSpec::new(name) };
        let vm = NETWORKS.iter().fold(vm, |vm, network| vm.with(network.nic(end)));
        config.push_str(&vm.config());
    }
    config
}

/// What a card hears, as tcpdump prints it.
struct Ear {
    job: Box<dyn Job>,
}

impl Ear {
    fn at(station: &dyn Station, card: &str) -> Result<Self> {
        let mut job = station.spawn(&format!("exec tcpdump -Z root -l -n -e -p -Q in -i {card}"))?;
        let start = wait_for("tcpdump", START, || Ok(job.output()?.contains("listening on")));
        start.or_else(|error| bail!("{error:#}: {}", job.output()?))?;
        Ok(Self { job })
    }

    /// Whether it has heard a frame with this text in its line.
    fn heard(&mut self, text: &str) -> Result<bool> {
        Ok(self.job.output()?.contains(text))
    }

    fn wait_for(&mut self, text: &str) -> Result<()> {
        let heard = wait_for(text, LIMIT, || self.heard(text));
        heard.or_else(|error| bail!("{error:#}: {}", self.job.output()?))
    }
}

/// A broadcast, and a frame to whoever has `mac` whether it answers or not.
fn shout(guest: &Guest, card: &str, address: &str, mac: &str) -> Result<()> {
    // No answers are expected where nobody may hear.
    let line = format!(
        "ip neigh flush dev {card}; ping -n -q -c 2 -i 0.2 -W 1 -I {card} {address}; \
         ip neigh replace {address} lladdr {mac} dev {card}; ping -n -q -c 2 -i 0.2 -W 1 -I {card} {address}; \
         ip neigh del {address} dev {card}; true"
    );
    guest.check(&line, LIMIT).map(drop)
}

#[test]
fn guests_see_whom_they_may_and_nobody_else() -> Result<()> {
    scene("guests_see_whom_they_may_and_nobody_else", &config(), |host, yardd, steps| {
        let mut witnesses = Vec::new();
        for network in NETWORKS {
            for end in [1, 2] {
                let witness = Namespace::new(host, &network.tap(end))?;
                // Beside a: .11; beside b: .12.
                witness.plug(&network.tap(end), &format!("{}/24", network.address(10 + end)))?;
                witnesses.push(witness);
            }
        }
        let spy = Namespace::new(host, "spy")?;
        spy.plug("spy", "10.4.0.13/24")?;
        let up = |name: &str| -> Result<Guest> {
            let mut guest = yardd.start_vm(name)?;
            println!("guest: {:.1} s", guest.wait_ready(BOOT)?.as_secs_f64());
            Ok(guest)
        };
        let (a, b) = (up("a")?, up("b")?);
        let witness =
            |network: &Network, end: u8| &witnesses[usize::from(network.number) * 2 + usize::from(end) - 1];
        steps.step("two guests on a private switch see each other", || {
            let mut stranger = Ear::at(&spy, "spy")?;
            let mut beside = Ear::at(witness(&VLANS, 1), &VLANS.tap(1))?;
            meet(&a, &b, &OPEN)?;
            transfer(&a, &b, &OPEN.address(2), 2_000_000)?;
            transfer(&b, &a, &OPEN.address(1), 2_000_000)?;
            shout(&a, &OPEN.card(&a, 1)?, &OPEN.address(99), &OPEN.mac(99))?;
            for ear in [&mut stranger, &mut beside] {
                for end in [1, 2] {
                    ensure!(!ear.heard(&OPEN.mac(end))?, "seen on another switch: {}", OPEN.mac(end));
                }
            }
            Ok(())
        });
        for (what, network) in [
            ("two VLANs", &VLANS),
            ("isolated ports of a private VLAN", &ISOLATED),
            ("two communities of a private VLAN", &COMMUNITIES),
            ("two switches", &APART),
        ] {
            steps.step(&format!("{what}: the guests do not see each other"), || {
                strangers(&a, &b, network, [witness(network, 1), witness(network, 2)])
            });
        }
        Ok(())
    })
}

fn meet(a: &Guest, b: &Guest, network: &Network) -> Result<()> {
    for (from, end) in [(a, 2), (b, 1)] {
        let address = network.address(end);
        wait_for(&format!("{} to reach {address}", from.name()), LIMIT, || {
            Ok(ping(from, &address, Ping { count: 1, ..Ping::default() })?.received == 1)
        })?;
    }
    Ok(())
}

/// Neither guest gets any frame of the other, while each gets those of the witness beside it, sent later.
fn strangers(a: &Guest, b: &Guest, network: &Network, witnesses: [&Namespace; 2]) -> Result<()> {
    let guests = [(a, 1, witnesses[0]), (b, 2, witnesses[1])];
    for (guest, end, _) in guests {
        let address = network.address(10 + end);
        wait_for(&format!("{} to reach its witness", guest.name()), LIMIT, || {
            Ok(ping(guest, &address, Ping { count: 1, ..Ping::default() })?.received == 1)
        })?;
    }
    for (victim, end, witness) in guests {
        let other = 3 - end;
        let (speaker, _, _) = guests[usize::from(other) - 1];
        let mut ear = Ear::at(victim, &network.card(victim, end)?)?;
        let address = network.address(end);
        shout(speaker, &network.card(speaker, other)?, &address, &network.mac(end))?;
        let tap = network.tap(end);
        let line = format!("ip neigh flush dev {tap}; ping -n -q -c 1 -W 5 -s 777 {address}");
        witness.check(&line, LIMIT)?;
        // 777 bytes, and the header of the echo.
        ear.wait_for("length 785")?;
        ensure!(
            !ear.heard(&network.mac(other))?,
            "{} hears {}: {}",
            victim.name(),
            speaker.name(),
            ear.job.output()?
        );
    }
    Ok(())
}
