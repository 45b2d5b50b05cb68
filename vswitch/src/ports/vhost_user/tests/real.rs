use super::rig::*;
use crate::ports::vhost_user::features::Negotiated;
use crate::ports::vhost_user::queue::ActiveRing;
use crate::ports::vhost_user::server::*;
use crate::ports::vhost_user::session::*;
use crate::spec::SocketMode;
use std::sync::{Arc, Mutex};
use vmq::doorbell::Doorbell;
use vmq::frame::{Burst, FrameStore};
use crate::tally::Tally;

#[test]
#[ignore]
fn real() {
    let control = Control::start().unwrap();
    let dir = std::path::PathBuf::from("/tmp/vhu-real");
    let _ = std::fs::create_dir(&dir);
    let ports: Vec<Port> = (0..2).map(|_| Port::default()).collect();
    for (n, port) in ports.iter().enumerate() {
        let mode = if std::env::var("CLIENT").is_ok() { SocketMode::Client } else { SocketMode::Server };
        control.add(PortEndpoint {
            path: dir.join(["A.sock", "B.sock"][n]),
            mode,
            config: SessionConfig { queues: 2, mtu: 9000, ..SessionConfig::default() },
            rings: Box::new(port.clone()),
            events: Box::new(move |event| println!("port {n}: {event:?}")),
        });
    }
    let start = std::time::Instant::now();
    let secs: u64 = std::env::var("SECS").unwrap().parse().unwrap();
    let (mut frames, mut delivered) = ([0u64; 2], [0u64; 2]);
    let mut last = 0;
    let mut shown: Option<String> = None;
    while start.elapsed().as_secs() < secs {
        for (from, to) in [(0, 1), (1, 0)] {
            let a = &mut *ports[from].0.lock().unwrap();
            let b = &mut *ports[to].0.lock().unwrap();
            let mut idle = true;
            for pair in 0..2 {
            let Some(Some(tx)) = a.rings.get_mut(2 * pair + 1) else { continue };
            let (mut store, mut t, mut p) = (FrameStore::default(), Tally::default(), Tally::default());
            {
                let mut burst = Burst::new(&mut store);
                if let Err(e) = tx.ring.receive(&mut burst, &mut t) { println!("fault {e}"); return; }
                if let Some(Some(rx)) = b.rings.get_mut(2 * pair) {
                    let list: Vec<u8> = (0..u8::try_from(burst.len()).unwrap()).collect();
                    if let Err(e) = rx.ring.put(&burst, &list, &mut p) { println!("fault {e}"); return; }
                }
            }
            tx.ring.complete();
            frames[from] += t.frames;
            delivered[to] += p.frames;
            idle &= t.frames == 0;
            }
            let _ = idle;
        }
        let s = start.elapsed().as_secs();
        if s != last {
            last = s;
            println!("{s}: tx {frames:?} rx {delivered:?} rings {} {} enabled {} {}", ports[0].installed(), ports[1].installed(), ports[0].enabled(), ports[1].enabled());
            let n: Option<Negotiated> = ports[0].0.lock().unwrap().negotiated;
            let n = n.map(|n| format!("{} | {}", n.features.names().join(" "), n.protocol.names().join(" ")));
            if n != shown { println!("{n:?}"); shown = n; }
        }
        std::thread::sleep(std::time::Duration::from_micros(20));
    }
}
