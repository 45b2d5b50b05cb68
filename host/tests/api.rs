//! The API over a real socket, with a stand-in for the switch behind it.

#![allow(clippy::unwrap_used, reason = "a failure to set up is a failure of the test")]

mod support;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use host::api::{BindError, Limits, Listener, OPENAPI, routes};
use serde_json::{Value, json};
use support::played::definition;
use support::{Answer, Fake, Server, connect, exchange};
use vswitch::pcap::{Direction, Reader};

fn start() -> (Arc<Fake>, Server) {
    let fake = Fake::with_lab();
    let server = Server::start(Arc::clone(&fake), Limits::default());
    (fake, server)
}

#[test]
fn contract_lists_every_route_and_no_other() {
    let contract: Value = serde_json::from_str(OPENAPI).unwrap();
    let mut listed = BTreeSet::new();
    for (path, methods) in contract["paths"].as_object().unwrap() {
        listed.extend(methods.as_object().unwrap().keys().map(|method| format!("{method} {path}")));
    }
    let served: BTreeSet<_> = routes().iter().map(|(method, path, _)| format!("{method} {path}")).collect();
    assert_eq!(listed, served);
    let (_, server) = start();
    assert_eq!(server.get("/v1/openapi.json").json(), contract);
}

#[test]
fn contract_names_every_part_of_its_paths_and_its_references_exist() {
    let contract: Value = serde_json::from_str(OPENAPI).unwrap();
    for (path, methods) in contract["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            for part in path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}')) {
                let parameters = operation["parameters"].as_array().cloned().unwrap_or_default();
                assert!(parameters.iter().any(|p| p["name"] == part), "{method} {path}: {part}");
            }
        }
    }
    for reference in OPENAPI.split("\"#").skip(1) {
        let pointer = reference.split('"').next().unwrap();
        assert!(contract.pointer(pointer).is_some(), "{pointer}");
    }
}

#[test]
fn report_version_and_lists_are_given() {
    let (_, server) = start();
    assert_eq!(server.get("/v1/version").json()["version"], env!("CARGO_PKG_VERSION"));
    let report = server.get("/v1/report").json();
    assert_eq!(report["switches"][0]["ports"][2]["state"], "faulted");
    assert_eq!(report["workers"][0]["cpu"], 1);
    assert_eq!(server.get("/v1/switches").json(), report["switches"]);
    assert_eq!(server.get("/v1/switches/lab").json(), report["switches"][0]);
    assert_eq!(server.get("/v1/switches/lab/ports").json(), report["switches"][0]["ports"]);
    assert_eq!(server.get("/v1/switches/lab/ports/red").json(), report["switches"][0]["ports"][0]);
}

#[test]
fn switch_and_port_live_and_die() {
    let (fake, server) = start();
    let body = json!({"name": "lan", "type": "internal", "port": {"a": {"vhost-user": {"path": "/run/a"}}}});
    let answer = server.send("POST", "/v1/switches", &body.to_string());
    assert_eq!(answer.status, 201, "{answer:?}");
    assert!(answer.head.contains("location: /v1/switches/lan"), "{}", answer.head);
    let names: Vec<_> =
        answer.json()["ports"].as_array().unwrap().iter().map(|port| port["name"].clone()).collect();
    assert_eq!(names, ["host", "a"]);

    let body = json!({"name": "b", "tap": {"name": "t0", "queues": 2}, "mtu": 9000, "pin": [1, 1]});
    let answer = server.send("POST", "/v1/switches/lan/ports", &body.to_string());
    assert_eq!((answer.status, answer.json()["mtu"].as_u64()), (201, Some(9000)));

    let answer = server.send("PATCH", "/v1/switches/lan/ports/b", r#"{"mtu": 1400, "vlan": {"access": 5}}"#);
    assert_eq!((answer.status, answer.json()["mtu"].as_u64()), (200, Some(1400)));
    assert!(fake.state().last.contains("vlan: Some(Access(5))"), "{}", fake.state().last);

    let pin = |body| server.send("PUT", "/v1/switches/lan/ports/b/queues/1/pin", body).status;
    assert_eq!(pin(r#"{"cpu": 3}"#), 204);
    assert_eq!(server.get("/v1/switches/lan/ports/b").json()["queues"][1]["cpu"], 3);
    assert_eq!(pin(r#"{"cpu": null}"#), 204);
    assert_eq!(server.get("/v1/switches/lan/ports/b").json()["queues"][1]["pinned"], false);

    assert_eq!(server.send("POST", "/v1/switches/lab/ports/grey/restart", "").status, 204);
    assert_eq!(server.get("/v1/switches/lab/ports/grey").json()["state"], "up");
    assert_eq!(server.send("DELETE", "/v1/switches/lan/ports/b", "").status, 204);
    assert_eq!(server.get("/v1/switches/lan/ports/b").problem(), "not-found");
    assert_eq!(server.send("DELETE", "/v1/switches/lan", "").status, 204);
    assert_eq!(server.get("/v1/switches/lan").status, 404);
}

#[test]
fn addresses_are_pinned_listed_and_forgotten() {
    let (_, server) = start();
    for (mac, port) in [("02:00:00:00:00:01", "red"), ("02:00:00:00:00:02", "blue")] {
        let body = json!({"mac": mac, "vlan": 7, "port": port}).to_string();
        assert_eq!(server.send("POST", "/v1/switches/lab/addresses", &body).status, 201);
    }
    assert_eq!(server.get("/v1/switches/lab/addresses").json()["total"], 2);
    let one = server.get("/v1/switches/lab/addresses?port=blue").json();
    assert_eq!((&one["total"], &one["addresses"][0]["mac"]), (&json!(1), &json!("02:00:00:00:00:02")));
    let none = server.get("/v1/switches/lab/addresses?limit=0").json();
    assert_eq!(none, json!({"total": 2, "addresses": []}));
    let gone = |query| server.send("DELETE", &format!("/v1/switches/lab/addresses/{query}"), "").status;
    assert_eq!(gone("02:00:00:00:00:01?vlan=8"), 404);
    assert_eq!(gone("02:00:00:00:00:01?vlan=7"), 204);
    assert_eq!(gone("red?vlan=7"), 400);
    assert_eq!(server.send("DELETE", "/v1/switches/lab/addresses", "").json(), json!({"flushed": 0}));
}

#[test]
fn wrong_request_is_a_problem_of_its_kind() {
    let (fake, server) = start();
    let port = r#"{"name": "red", "tap": {"name": "t"}}"#;
    for (method, path, body, status, kind) in [
        ("GET", "/", "", 404, "no-route"),
        ("GET", "/v2/report", "", 404, "no-route"),
        ("DELETE", "/v1/report", "", 405, "method"),
        ("GET", "/v1/switches/none", "", 404, "not-found"),
        ("GET", "/v1/switches/lab/ports/none", "", 404, "not-found"),
        ("GET", "/v1/switches/%ff", "", 400, "bad-request"),
        ("POST", "/v1/switches", "{", 400, "bad-request"),
        ("POST", "/v1/switches", "", 400, "bad-request"),
        ("POST", "/v1/switches", "[]", 422, "invalid"),
        ("POST", "/v1/switches", r#"{"name": "lab", "type": "private"}"#, 409, "exists"),
        ("POST", "/v1/switches", r#"{"name": "a\nb", "type": "private"}"#, 422, "invalid"),
        ("POST", "/v1/switches", r#"{"name": "../a", "type": "private"}"#, 422, "invalid"),
        ("POST", "/v1/switches/none/ports", port, 404, "not-found"),
        ("POST", "/v1/switches/lab/ports", port, 409, "exists"),
        ("POST", "/v1/switches/lab/ports", r#"{"name": "broken", "tap": {"name": "t"}}"#, 500, "failed"),
        ("POST", "/v1/switches/lab/ports", r#"{"name": "x", "uplink": {"device": "e"}}"#, 422, "invalid"),
        ("PATCH", "/v1/switches/lab/ports/red", r#"{"mac": "02:00:00:00:00:01"}"#, 422, "invalid"),
        ("PUT", "/v1/switches/lab/ports/red/queues/9/pin", r#"{"cpu": 1}"#, 404, "not-found"),
        ("PUT", "/v1/switches/lab/ports/red/queues/x/pin", r#"{"cpu": 1}"#, 400, "bad-request"),
        ("PUT", "/v1/switches/lab/ports/red/queues/0/pin", "{}", 422, "invalid"),
        ("GET", "/v1/switches/lab/addresses?limit=x", "", 400, "bad-request"),
        ("GET", "/v1/switches/lab/addresses?colour=red", "", 400, "bad-request"),
        ("GET", "/v1/switches/none/capture", "", 404, "not-found"),
    ] {
        let answer = server.send(method, path, body);
        assert_eq!((answer.status, answer.problem().as_str()), (status, kind), "{method} {path} {body}");
    }
    assert_eq!(fake.state().switches.len(), 1);
    assert_eq!(fake.state().switches[0].ports.len(), 4);
}

#[test]
fn wrong_port_is_refused_in_the_words_of_the_configuration_file() {
    let (_, server) = start();
    let body = r#"{"name": "x", "tap": {"name": "t"}, "mtu": 70000, "vlna": 1}"#;
    let answer = server.send("POST", "/v1/switches/lab/ports", body).json();
    assert_eq!(
        answer["problems"],
        json!([
            {"key": "vlna", "message": "unknown key (did you mean `vlan`?)"},
            {"key": "mtu", "message": "70000 is out of range, expected 68 to 9216"},
        ])
    );
}

#[test]
fn switch_whose_port_fails_is_not_made() {
    let (fake, server) = start();
    let body = r#"{"name": "x", "type": "private", "port": {"broken": {"tap": {"name": "t"}}}}"#;
    assert_eq!(server.send("POST", "/v1/switches", body).problem(), "failed");
    assert_eq!(fake.state().switches.len(), 1);
}

#[test]
fn body_of_one_gibibyte_is_refused_without_being_read() {
    let (_, server) = start();
    let mut stream = connect(&server.socket);
    write!(stream, "POST /v1/switches HTTP/1.1\r\nhost: y\r\ncontent-length: 1073741824\r\n\r\n").unwrap();
    assert_eq!(Answer::read(&mut stream).unwrap().problem(), "too-large");

    // Without a length it is cut off while it comes.
    let mut stream = connect(&server.socket);
    write!(stream, "POST /v1/switches HTTP/1.1\r\nhost: y\r\ntransfer-encoding: chunked\r\n\r\n").unwrap();
    let chunk = [b"10000\r\n".as_slice(), &[b' '; 0x10000], b"\r\n"].concat();
    let sent = (0..16_384).take_while(|_| stream.write_all(&chunk).is_ok()).count();
    assert!(sent < 64, "{sent} pieces of 64 KiB were taken");
    assert_eq!(server.get("/v1/version").status, 200);
}

#[test]
fn thousand_clients_at_once_are_all_served() {
    let (fake, server) = start();
    // All connect and send before any reads its answer.
    let mut clients: Vec<_> = (0..1000)
        .map(|_| {
            let mut stream = connect(&server.socket);
            stream.write_all(b"GET /v1/report HTTP/1.1\r\nhost: y\r\n\r\n").unwrap();
            stream
        })
        .collect();
    for stream in &mut clients {
        assert_eq!(Answer::read(stream).expect("an answer").status, 200);
    }
    assert_eq!(fake.reports.load(Ordering::Relaxed), 1000);
}

fn small_limits() -> Limits {
    let short = Duration::from_millis(300);
    Limits {
        connections: 4,
        captures: 1,
        head_time: short,
        body_time: short,
        exchange_time: 4 * short,
        ..Limits::default()
    }
}

#[test]
fn slow_loris_loses_its_place_and_others_are_served() {
    let server = Server::start(Fake::with_lab(), small_limits());
    let began = Instant::now();
    let mut slow: Vec<_> = (0..12).map(|_| connect(&server.socket)).collect();
    for (index, stream) in slow.iter_mut().enumerate() {
        // Some send nothing at all, some a part of the head.
        stream.write_all(&b"GET /v1/report HTTP/1.1\r\nhost:"[..index % 3 * 10]).unwrap();
    }
    assert_eq!(server.get("/v1/version").status, 200);
    assert!(began.elapsed() >= Duration::from_millis(300), "the places were all taken");
    for stream in &mut slow {
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(!rest.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&rest));
    }
}

#[test]
fn slow_body_is_a_timeout() {
    let server = Server::start(Fake::with_lab(), small_limits());
    let mut stream = connect(&server.socket);
    stream.write_all(b"POST /v1/switches HTTP/1.1\r\nhost: y\r\ncontent-length: 9\r\n\r\n{").unwrap();
    assert_eq!(Answer::read(&mut stream).unwrap().problem(), "timeout");
}

#[test]
fn client_that_never_reads_loses_its_place() {
    let fake = Fake::with_lab();
    // An answer far larger than a socket's buffer.
    let long = "x".repeat(4 << 20);
    fake.state().switches[0].ports[0].last_error = Some(long);
    let server = Server::start(fake, small_limits());
    let mut deaf: Vec<_> = (0..4).map(|_| connect(&server.socket)).collect();
    for stream in &mut deaf {
        stream.write_all(b"GET /v1/report HTTP/1.1\r\nhost: y\r\n\r\n").unwrap();
    }
    assert_eq!(server.get("/v1/version").status, 200);
}

#[test]
fn bytes_that_are_no_http_harm_nobody() {
    let (_, server) = start();
    let head = [b'x'; 200_000];
    for garbage in [b"\0\xff\x16\x03\x01".as_slice(), b"GET / HTTP/9.9\r\n\r\n", b"\r\n\r\n\r\n", &head] {
        let mut stream = connect(&server.socket);
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = Answer::read(&mut stream);
    }
    assert_eq!(server.get("/v1/version").status, 200);
}

#[test]
fn capture_is_a_pcapng_with_interfaces_reasons_and_losses() {
    let fake = Fake::with_lab();
    fake.capture_ends.store(true, Ordering::Relaxed);
    let server = Server::start(fake, Limits::default());
    let answer = server.get("/v1/switches/lab/capture?drops=true&snaplen=40");
    assert!(answer.head.contains("content-type: application/x-pcapng"), "{}", answer.head);
    let mut reader = Reader::open(answer.body.as_slice()).unwrap();
    let mut found = Vec::new();
    while let Some(record) = reader.next().unwrap() {
        assert_eq!(record.direction(), Some(Direction::Inbound));
        let comment = record.comment().unwrap_or_default().to_owned();
        found.push((record.time, record.interface, record.data.len(), record.original_len, comment));
    }
    assert_eq!(
        found,
        [
            (1_000_000_001, 0, 40, 100, String::new()),
            (2, 1, 40, 100, "dropped: source is not the port's MAC address".into()),
            (3, 0, 40, 100, String::new()),
        ]
    );
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(text.contains("lab/red") && text.contains("lab/blue"));
}

/// Reads until the first frames are there.
fn begin_capture(server: &Server) -> UnixStream {
    let mut stream = connect(&server.socket);
    stream.write_all(b"GET /v1/switches/lab/capture HTTP/1.1\r\nhost: y\r\n\r\n").unwrap();
    let mut seen = Vec::new();
    while !seen.windows(7).any(|bytes| bytes == b"lab/red") {
        let mut piece = [0; 4096];
        let length = match stream.read(&mut piece) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            length => length.unwrap(),
        };
        assert!(length > 0, "{}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&piece[..length]);
    }
    stream
}

#[test]
fn captures_are_limited_outlive_the_deadline_and_free_their_place() {
    let server = Server::start(Fake::with_lab(), small_limits());
    let mut stream = begin_capture(&server);
    assert_eq!(server.get("/v1/switches/lab/capture").problem(), "busy");
    std::thread::sleep(2 * small_limits().exchange_time);
    stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(stream.read(&mut [0; 64]).is_err(), "still open, with nothing to read");
    drop(stream);
    let began = Instant::now();
    while server.get("/v1/version").status != 200 || {
        let mut stream = connect(&server.socket);
        stream.write_all(b"GET /v1/switches/lab/capture HTTP/1.1\r\nhost: y\r\n\r\n").unwrap();
        let mut status = [0; 12];
        stream.read_exact(&mut status).unwrap();
        &status != b"HTTP/1.1 200"
    } {
        assert!(began.elapsed() < Duration::from_secs(20), "the place was not freed");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn orders_to_vms_are_limited_and_what_shows_or_switches_is_not() {
    let server = |orders| Server::start(Fake::with_lab(), Limits { orders, ..Limits::default() });
    let define =
        |server: &Server, name| server.send("POST", "/v1/vms", &definition(name, json!({})).to_string());
    let full = server(0);
    assert_eq!(define(&full, "web").problem(), "busy");
    assert_eq!(full.get("/v1/vms/web").problem(), "busy");
    for path in ["/v1/vms", "/v1/report", "/v1/metrics", "/v1/switches/lab/ports/red"] {
        assert_eq!(full.get(path).status, 200, "{path}");
    }
    assert_eq!(full.send("POST", "/v1/switches/lab/ports/red/restart", "").status, 204);
    let one = server(1);
    for name in ["web", "db"] {
        assert_eq!(define(&one, name).status, 201, "an order that was carried out leaves its place");
    }
}

#[test]
fn daemon_that_ends_closes_captures_in_good_order() {
    let mut server = Server::start(Fake::with_lab(), Limits::default());
    let mut stream = begin_capture(&server);
    let reader = std::thread::spawn(move || {
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        rest
    });
    server.end();
    let rest = reader.join().unwrap();
    assert!(rest.ends_with(b"0\r\n\r\n"), "the last chunk came");
    assert!(!server.socket.exists());
}

#[test]
fn metrics_are_lines_that_prometheus_reads() {
    let (_, server) = start();
    let text = server.get("/v1/metrics").text();
    for line in [
        &format!("switchyard_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION")),
        "switchyard_port_rx_frames_total{switch=\"lab\",port=\"red\",queue=\"0\"} 1234567",
        "switchyard_port_tx_bytes_total{switch=\"lab\",port=\"red\",queue=\"0\"} 768",
        "switchyard_port_rx_drops_total{switch=\"lab\",port=\"red\",queue=\"0\",reason=\"spoofed\"} 3",
        "switchyard_port_tx_drops_total{switch=\"lab\",port=\"red\",queue=\"0\",reason=\"queue-full\"} 4",
        "switchyard_port_state{switch=\"lab\",port=\"grey\",kind=\"vhost-user\",state=\"faulted\"} 1",
        "switchyard_worker_load_ratio{cpu=\"1\"} 0.345",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    let mut typed = BTreeSet::new();
    for line in text.lines() {
        match line.strip_prefix("# TYPE ") {
            Some(rest) => assert!(typed.insert(rest.split(' ').next().unwrap()), "typed twice: {line}"),
            None if line.starts_with("# HELP ") => {}
            None => {
                let (name, rest) = line.split_once('{').unwrap();
                let (_, value) = rest.split_once("} ").unwrap();
                assert!(typed.contains(name) && value.parse::<f64>().is_ok(), "{line}");
            }
        }
    }
}

#[test]
fn socket_is_for_user_and_group_and_removed_at_the_end() {
    let (_, mut server) = start();
    let mode = std::fs::metadata(&server.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    server.end();
    assert_eq!(std::fs::read_dir(server.socket.parent().unwrap()).unwrap().count(), 0);
}

#[tokio::test]
async fn stale_socket_is_replaced_a_live_one_and_a_file_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("yardd.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "left behind as by a killed daemon");
    let listener = Listener::bind(&path).unwrap();
    let error = Listener::bind(&path).unwrap_err();
    assert!(matches!(error, BindError::InUse { .. }), "{error}");
    drop(listener);
    assert!(!path.exists());
    std::fs::write(&path, "precious").unwrap();
    let error = Listener::bind(&path).unwrap_err();
    assert!(matches!(error, BindError::NotASocket { .. }), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn client_that_hangs_up_mid_request_harms_nobody() {
    let (_, server) = start();
    for cut in [1, 10, 40, 70] {
        let request = b"POST /v1/switches HTTP/1.1\r\nhost: y\r\ncontent-length: 40\r\n\r\n{\"name\": \"x\", \"type\": ";
        connect(&server.socket).write_all(&request[..cut]).unwrap();
    }
    assert_eq!(exchange(&server.socket, "GET", "/v1/version", "").status, 200);
}

#[test]
fn vm_is_defined_run_changed_and_forgotten() {
    let (_, server) = start();
    let body = definition("web", json!({})).to_string();
    let answer = server.send("POST", "/v1/vms", &body);
    assert_eq!(answer.status, 201, "{answer:?}");
    assert!(answer.head.contains("location: /v1/vms/web"), "{}", answer.head);
    assert_eq!(answer.json()["state"], "off");
    let post = |what: &str| server.send("POST", &format!("/v1/vms/web/{what}"), "");
    assert_eq!(post("start").status, 204);
    let vm = server.get("/v1/vms/web").json();
    assert_eq!((&vm["state"], &vm["guest"]["heartbeat"]), (&json!("running"), &json!("ok")));
    assert_eq!(vm["nics"][0]["port"], "web.eth0");
    assert_eq!(server.get("/v1/vms").json()[0]["name"], "web");
    assert_eq!(server.get("/v1/report").json()["vms"][0]["name"], "web");
    let metrics = server.get("/v1/metrics").text();
    assert!(metrics.contains("switchyard_vm_state{vm=\"web\",state=\"running\"} 1\n"), "{metrics}");
    assert!(metrics.contains("switchyard_vm_memory_bytes{vm=\"web\"} 67108864\n"), "{metrics}");
    for what in ["pause", "resume", "reset", "thaw", "sync-time", "shutdown?reboot=true"] {
        assert_eq!(post(what).status, 204, "{what}");
    }
    let answer = server.send("PATCH", "/v1/vms/web", r#"{"memory": "96M", "cpu": {"weight": 7}}"#);
    assert_eq!((answer.status, &answer.json()["cpu"]["weight"]), (200, &json!(7)));
    let answer = server.send("POST", "/v1/vms/web/nics", r#"{"name": "eth1", "switch": "lab"}"#);
    assert_eq!(answer.status, 201, "{answer:?}");
    assert!(answer.head.contains("location: /v1/vms/web/nics/eth1"), "{}", answer.head);
    let answer = server.send("PATCH", "/v1/vms/web/nics/eth1", r#"{"mtu": 9000}"#);
    assert_eq!((answer.status, &answer.json()["nics"][1]["mtu"]), (200, &json!(9000)));
    let answer = server.send("PATCH", "/v1/vms/web/nics/eth1", r#"{"link": "down"}"#);
    assert_eq!((answer.status, &answer.json()["nics"][1]["link"]), (200, &json!("down")));
    assert_eq!(server.send("DELETE", "/v1/vms/web/nics/eth1", "").status, 204);
    assert_eq!(server.send("PUT", "/v1/vms/web/values/role", r#"{"value": "front"}"#).status, 204);
    let values = server.get("/v1/vms/web").json()["guest"]["values"].clone();
    assert!(values.as_array().unwrap().contains(&json!(["role", "front"])), "{values}");
    assert_eq!(server.send("DELETE", "/v1/vms/web/values/role", "").status, 204);
    assert_eq!(post("stop").status, 204);
    assert_eq!(server.send("DELETE", "/v1/vms/web", "").status, 204);
    assert_eq!(server.get("/v1/vms/web").problem(), "not-found");
}

#[test]
fn wrong_request_about_a_vm_is_a_problem_of_its_kind() {
    let (_, server) = start();
    let web = definition("web", json!({})).to_string();
    assert_eq!(server.send("POST", "/v1/vms", &web).status, 201);
    let elsewhere = definition("db", json!({ "nic": [{ "name": "e", "switch": "none" }] })).to_string();
    let wrong = definition("db", json!({ "kernel": "vmlinuz" })).to_string();
    for (method, path, body, status, kind) in [
        ("POST", "/v1/vms", web.as_str(), 409, "exists"),
        ("POST", "/v1/vms", elsewhere.as_str(), 404, "not-found"),
        ("POST", "/v1/vms", wrong.as_str(), 422, "invalid"),
        ("GET", "/v1/vms/none", "", 404, "not-found"),
        ("POST", "/v1/vms/none/start", "", 404, "not-found"),
        ("POST", "/v1/vms/web/stop", "", 409, "state"),
        ("POST", "/v1/vms/web/pause", "", 409, "state"),
        ("POST", "/v1/vms/web/shutdown?reboot=perhaps", "", 400, "bad-request"),
        ("PATCH", "/v1/vms/web", r#"{"vcpus": 4}"#, 422, "invalid"),
        ("PATCH", "/v1/vms/web", r#"{"memory": "1G"}"#, 422, "invalid"),
        ("PATCH", "/v1/vms/web/nics/none", r#"{"mtu": 9000}"#, 404, "not-found"),
        ("DELETE", "/v1/vms/web/nics/none", "", 404, "not-found"),
        ("PUT", "/v1/vms/web/values/a", r#"{"value": 1}"#, 422, "invalid"),
    ] {
        let answer = server.send(method, path, body);
        assert_eq!((answer.status, answer.problem().as_str()), (status, kind), "{method} {path} {body}");
    }
}
