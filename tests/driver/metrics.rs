//! What is counted of a device's queues, and who can read it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;

use client::{BlockOptions, RequestType};
use serde_json::{Value, json};
use vfio_user_blk::control::ControlClient;

use crate::binary::{Served, command, disk};
use crate::rig::{DISK, IOERR, LIMIT, Machine, execute, exercise, until};

fn serve(more: &[&str]) -> Served {
    Served::start(|folder| {
        let mut arguments = disk(&folder.join("blk.sock"));
        for (option, name) in [("--control-socket", "control.sock"), ("--metrics-socket", "metrics.sock")] {
            arguments.extend([option.to_owned(), folder.join(name).display().to_string()]);
        }
        arguments.extend(more.iter().map(|&word| word.to_owned()));
        arguments
    })
}

/// Asks for something as HTTP does: the head of the answer and its body.
fn ask(mut stream: impl Read + Write, request: &str) -> (String, String) {
    stream.write_all(format!("{request}\r\nHost: x\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).unwrap();
    assert_eq!(length.parse(), Ok(body.len()));
    (head.to_owned(), body.to_owned())
}

fn scrape(folder: &Path) -> String {
    let stream = UnixStream::connect(folder.join("metrics.sock")).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let (head, body) = ask(stream, "GET /metrics HTTP/1.1");
    assert!(head.starts_with("HTTP/1.0 200 OK") && head.contains("openmetrics-text; version=1.0.0"), "{head}");
    assert!(body.ends_with("# EOF\n"), "{body}");
    body
}

/// The value of a sample of the device `root`.
fn sample(text: &str, name: &str, labels: &str) -> f64 {
    let start = format!("vfio_user_blk_{name}{{device=\"root\",{labels}}} ");
    let value = text.lines().find_map(|line| line.strip_prefix(&start));
    value.unwrap_or_else(|| panic!("no {start} in:\n{text}")).parse().unwrap()
}

fn statistics(server: &Served) -> Value {
    let mut operator = ControlClient::connect(&server.folder().join("control.sock")).unwrap();
    operator.call("device.statistics", &json!({ "device": "root" })).unwrap()["queues"].take()
}

#[test]
fn each_request_is_counted_once_where_it_was_made() {
    for poll in ["never", "adaptive"] {
        let server = serve(&["--name", "root", "--num-queues", "3", "--poll", poll]);
        let mut machine = Machine::new(server.client(), &BlockOptions::default());
        let before = statistics(&server);
        let queue = &mut machine.queues[1];
        for round in 0..7 {
            queue.write(round, &[1; 1024]).unwrap();
        }
        let mut back = [0; 4096];
        for _ in 0..5 {
            queue.read(0, &mut back).unwrap();
        }
        queue.flush().unwrap();
        queue.write_zeroes(0, 8, true).unwrap();
        queue.get_id().unwrap();
        let data = machine.memory.allocate(512, 512).unwrap();
        let beyond = [data.segment(0, 512).unwrap()];
        assert_eq!(execute(&mut machine.queues[1], RequestType::Read, DISK / 512, &beyond).status, IOERR);
        // The last round is counted when it is over, which is after the driver has heard of it.
        until("all is counted", || statistics(&server)[1]["other"] == 2);
        let now = statistics(&server);
        for (key, expected) in [
            ("reads", 5),
            ("writes", 7),
            ("flushes", 1),
            ("write_zeroes", 1),
            ("discards", 0),
            ("other", 2),
            ("read_bytes", 5 * 4096),
            ("written_bytes", 7 * 1024),
            ("io_errors", 0),
            ("unsupported", 0),
            ("in_flight", 0),
        ] {
            assert_eq!(now[1][key], expected, "{key} of {now:#}");
            assert_eq!(now[0][key], before[0][key], "{key} of another queue");
        }
        let [kicks, sent, suppressed] =
            ["kicks", "interrupts_sent", "interrupts_suppressed"].map(|key| now[1][key].as_u64().unwrap());
        assert!((1..=16).contains(&kicks) && (1..=16).contains(&sent) && sent + suppressed <= 16, "{now:#}");
        let text = scrape(server.folder());
        assert_eq!(sample(&text, "operations_total", "queue=\"1\",operation=\"write\""), 7.0);
        assert_eq!(sample(&text, "operations_total", "queue=\"0\",operation=\"write\""), 0.0);
        assert_eq!(sample(&text, "transferred_bytes_total", "queue=\"1\",direction=\"read\""), 20480.0);
        assert_eq!(sample(&text, "stage_seconds_count", "queue=\"1\",stage=\"submit_to_reap\""), 14.0);
        let all = "stage_seconds_bucket{le=\"+Inf\",device=\"root\",queue=\"1\",stage=\"submit_to_reap\"} 14\n";
        assert!(text.contains(all), "{text}");
        assert!(sample(&text, "stage_seconds_sum", "queue=\"1\",stage=\"submit_to_reap\"") < 60.0);
        let of_stage = |stage: &str| sample(&text, "stage_seconds_count", &format!("queue=\"1\",stage=\"{stage}\""));
        assert!((1.0..=16.0).contains(&of_stage("kick_to_submit")), "{text}");
        assert!((1.0..=16.0).contains(&of_stage("reap_to_interrupt")), "{text}");
        assert!(sample(&text, "polls_total", "queue=\"1\",found=\"work\"") >= 1.0);
        assert_eq!(sample(&text, "requests_in_flight", "queue=\"1\""), 0.0);
        drop(machine);
        // Clients come and go, and counters stay; an operator counts anew, and Prometheus does not.
        let mut machine = Machine::new(server.client(), &BlockOptions::default());
        machine.queues[1].flush().unwrap();
        until("one more is counted", || statistics(&server)[1]["flushes"] == 2);
        let mut operator = ControlClient::connect(&server.folder().join("control.sock")).unwrap();
        operator.call("device.reset_statistics", &json!({ "device": "root" })).unwrap();
        assert_eq!(statistics(&server)[1]["writes"], 0);
        machine.queues[1].write(0, &[1; 512]).unwrap();
        until("it counts anew", || statistics(&server)[1]["writes"] == 1);
        assert_eq!(sample(&scrape(server.folder()), "operations_total", "queue=\"1\",operation=\"write\""), 8.0);
        drop(machine);
        server.stop();
    }
}

/// By a store that takes its time, and by errors of it.
#[test]
fn the_stores_part_is_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    let server = serve(&["--name", "root", "--blk-file", image.to_str().unwrap()]);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    exercise(&mut machine.queues);
    // Shorter than it was when it was opened: what lies beyond cannot be read.
    std::fs::File::options().write(true).open(&image).unwrap().set_len(DISK / 2).unwrap();
    let data = machine.memory.allocate(512, 512).unwrap();
    let segment = [data.segment(0, 512).unwrap()];
    assert_eq!(execute(&mut machine.queues[0], RequestType::Read, DISK / 512 - 1, &segment).status, IOERR);
    until("the error is counted", || statistics(&server)[0]["io_errors"] == 1);
    let now = statistics(&server);
    assert!(now[0]["submit_to_reap_ns"].as_u64().unwrap() > 0, "{now:#}");
    let text = scrape(server.folder());
    assert_eq!(sample(&text, "errors_total", "queue=\"0\",error=\"io\""), 1.0);
    drop(machine);
    server.stop();
}

#[test]
fn anybody_of_this_machine_may_ask_by_tcp() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let address = free.to_string();
    let server = serve(&["--name", "root", "--metrics-address", &address]);
    let connect = || {
        let stream = TcpStream::connect(free).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    };
    assert!(ask(connect(), "GET /metrics HTTP/1.0").1.contains("device=\"root\""));
    assert!(ask(connect(), "GET /secrets HTTP/1.0").0.starts_with("HTTP/1.0 404"));
    assert!(ask(connect(), "POST /metrics HTTP/1.0").0.starts_with("HTTP/1.0 405"));
    // Too much of it: an answer, or none if there was more on the way.
    let mut endless = connect();
    let _cut_off = endless.write_all(&vec![b'x'; 100_000]);
    let mut answer = String::new();
    assert!(endless.read_to_string(&mut answer).is_err() || answer.starts_with("HTTP/1.0 431"), "{answer}");
    // Who goes without a word, or in the middle of one, keeps nobody from asking.
    drop(connect());
    connect().write_all(b"GET /metr").unwrap();
    assert!(ask(connect(), "GET /metrics HTTP/1.0").0.contains("200"));
    let folder = server.stop();
    assert!(!folder.path().join("metrics.sock").exists());
    let refused =
        command().args(["serve", "--socket-path", "a", "--metrics-address", "0.0.0.0:9100"]).output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(refused.status.code() == Some(78) && said.contains("metrics_remote"), "{said}");
}
