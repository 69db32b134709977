//! Many clients that vanish, many ends, many slow ones. The ordinary run is a short form;
//! `scripts/soak` sets `PODIUM_SOAK` for the long one, and shows the figures.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use podium::backend::random::uniform;
use serde_json::{Value, json};

use crate::chat_model::ChatModel;
use crate::running::{PATIENCE, Running, outcome, user, with};

/// How often, in the long and in the short form.
fn times(long: usize, short: usize) -> usize {
    match std::env::var_os("PODIUM_SOAK") {
        Some(_) => long,
        None => short,
    }
}

/// Random numbers by a name and a place.
fn random(stream: u32, place: usize) -> f64 {
    f64::from(uniform(7, stream, place as u32))
}

fn pick<T>(of: &[T], stream: u32, place: usize) -> &T {
    &of[(random(stream, place) * of.len() as f64) as usize % of.len()]
}

/// A request of each kind: short and long, streaming or not, chosen in every way, scoring.
fn any_request(place: usize) -> (&'static str, Value) {
    let seed = place as u64;
    let tokens = 1 + (random(1, place) * 300.0) as usize;
    let words = "so it goes ".repeat(1 + (random(2, place) * random(2, place) * 400.0) as usize);
    let mut body =
        json!({"max_tokens": tokens, "seed": seed, "ignore_eos": random(3, place) < 0.8});
    if random(4, place) < 0.1 {
        let candidates: Vec<String> = (1..20).map(|k| "well ".repeat(k)).collect();
        return (
            "/v1/rerank",
            json!({"query": words, "documents": candidates, "ranker": "mine"}),
        );
    }
    if random(5, place) < 0.6 {
        body = with(
            &body,
            json!({"best_of": 1 + (random(6, place) * 6.0) as usize}),
        );
    }
    if random(7, place) < 0.5 {
        body = with(
            &body,
            json!({"select": pick(&["first", "logprob", "majority", "ranker"], 8, place), "ranker": "mine"}),
        );
    }
    if random(9, place) < 0.3 {
        body = with(
            &body,
            json!({"logprobs": if random(10, place) < 0.5 { json!(2) } else { json!(null) }, "return_all": true}),
        );
    }
    if random(11, place) < 0.6 {
        body = with(
            &body,
            json!({"stream": true, "stream_candidates": random(12, place) < 0.5}),
        );
    }
    match random(13, place) < 0.5 {
        true => ("/v1/completions", with(&body, json!({"prompt": words}))),
        false => {
            body.as_object_mut().unwrap().remove("logprobs");
            (
                "/v1/chat/completions",
                with(&body, json!({"messages": user(&words)})),
            )
        }
    }
}

/// Sends a request, or a part of it, and goes away at some moment. Gives the phase that it left in.
fn vanish(server: &Running, place: usize) -> &'static str {
    let (path, body) = any_request(place);
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut stream = TcpStream::connect(&server.address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let part = |text: &str| (random(20, place) * text.len() as f64) as usize;
    let phase = *pick(
        &[
            "head",
            "body",
            "sent",
            "soon",
            "later",
            "answering",
            "answered",
        ],
        21,
        place,
    );
    let wait = |most: f64| {
        let fraction = random(22, place);
        std::thread::sleep(Duration::from_secs_f64(most * fraction * fraction));
    };
    // The server may have cut the connection for a reason of its own.
    let mut send = |text: &[u8]| drop(stream.write_all(text));
    match phase {
        "head" => send(&head.as_bytes()[..part(&head)]),
        "body" => send(&[head.as_bytes(), &body.as_bytes()[..part(&body)]].concat()),
        _ => send(&[head.as_bytes(), body.as_bytes()].concat()),
    }
    let mut buffer = [0; 512];
    match phase {
        "soon" => wait(0.01),
        "later" => wait(0.3),
        "answering" => drop(stream.read(&mut buffer)),
        "answered" => {
            while !matches!(stream.read(&mut buffer), Ok(count) if count < buffer.len()) {}
        }
        _ => {}
    }
    phase
}

#[test]
fn clients_vanish_in_every_phase() {
    let count = times(1000, 80);
    let model = ChatModel::with_context(1, 2048);
    let option = format!("mine={}", model.ranker("mine", &[]).display());
    // Little memory and few places: groups wait, lose their pages and come back.
    let server = Running::start(
        model.path(),
        &[
            "--ranker",
            &option,
            "--kv-memory",
            "8",
            "--max-batch",
            "24",
            "--header-timeout",
            "2",
        ],
    );
    let reference = || {
        let body = json!({"messages": user("Hi there"), "best_of": 5, "max_tokens": 60, "seed": 3,
            "ranker": "mine", "return_all": true, "temperature": 1.3});
        outcome(&server.answer("/v1/chat/completions", body))
    };
    let expected = reference();
    let (next, phases) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let mut checks = 0;
    while next.load(Ordering::Relaxed) < count {
        let until = (next.load(Ordering::Relaxed) + 40).min(count);
        std::thread::scope(|scope| {
            for _ in 0..12 {
                scope.spawn(|| {
                    while let Ok(place) =
                        next.fetch_update(Ordering::AcqRel, Ordering::Acquire, |place| {
                            (place < until).then_some(place + 1)
                        })
                    {
                        let phase = vanish(&server, place);
                        let mut phases = phases.lock().unwrap_or_else(PoisonError::into_inner);
                        *phases.entry(phase).or_insert(0) += 1;
                    }
                });
            }
        });
        // While the last ones are being noticed, and after: the same bits.
        assert_eq!(reference(), expected);
        server.wait_until_idle();
        assert_eq!(server.get("/load").1["server_load"], 0);
        assert_eq!(reference(), expected);
        checks += 1;
    }
    let phases = phases.into_inner().unwrap_or_else(PoisonError::into_inner);
    assert_eq!(phases.values().sum::<usize>(), count);
    assert_eq!(phases.len(), 7, "{phases:?}");
    let ended = |how: &str| {
        server.metric(&format!(
            "vllm:request_success_total{{finished_reason=\"{how}\"}}"
        ))
    };
    let (aborted, preempted) = (ended("abort"), server.metric("vllm:num_preemptions_total"));
    assert!(
        aborted > 0.1 * count as f64,
        "{aborted} of {count} were cancelled"
    );
    eprintln!(
        "{count} clients vanished: {phases:?}; {aborted} groups cancelled, {preempted} preemptions; \
         after each of {checks} waves no page was held and the next answer had the same bits"
    );
}

/// What a client of the load got.
#[derive(Debug, PartialEq, Eq, Clone, Copy, PartialOrd, Ord)]
enum Got {
    Answer,
    /// 503, or an event that says so.
    Refusal,
    /// The connection was closed without a byte.
    Nothing,
    /// Part of an answer.
    Torn,
}

/// Sends a request of the load, and reads what comes.
fn ask(address: &str, place: usize) -> Got {
    let mut body = json!({"prompt": "x ".repeat(1 + place % 60), "max_tokens": 1 + place % 90,
        "best_of": 1 + place % 4, "ignore_eos": true, "seed": place});
    if place.is_multiple_of(2) {
        body = with(
            &body,
            json!({"stream": true, "stream_candidates": place.is_multiple_of(4)}),
        );
    }
    let body = body.to_string();
    let mut text = Vec::new();
    let talked = TcpStream::connect(address).and_then(|mut stream| {
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(
            stream,
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )?;
        stream.read_to_end(&mut text)
    });
    let text = String::from_utf8_lossy(&text);
    match (text.split_once("\r\n\r\n"), talked) {
        (None, _) if text.is_empty() => Got::Nothing,
        (Some((head, _)), Ok(_)) if head.starts_with("HTTP/1.1 503") => Got::Refusal,
        (Some((head, rest)), Ok(_)) if head.starts_with("HTTP/1.1 200") => {
            let whole = match place % 2 {
                0 => rest.contains("data: [DONE]"),
                _ => serde_json::from_str::<Value>(rest)
                    .is_ok_and(|answer| answer["choices"][0]["finish_reason"] == "length"),
            };
            if whole { Got::Answer } else { Got::Torn }
        }
        _ => Got::Torn,
    }
}

#[test]
fn the_signal_loses_nothing_under_load() {
    let count = times(50, 4);
    let model = ChatModel::with_context(1, 2048);
    let mut all = BTreeMap::new();
    let (mut slowest, mut at_once) = (Duration::ZERO, 0);
    for round in 0..count {
        let options = [
            "--kv-memory",
            "4",
            "--max-batch",
            "12",
            "--drain-timeout",
            "40",
        ];
        let server = Running::start(model.path(), &options);
        let address = server.address.clone();
        let (place, signalled) = (AtomicUsize::new(1000 * round), AtomicBool::new(false));
        let got = Mutex::new(Vec::new());
        let mut in_flight = 0;
        std::thread::scope(|scope| {
            for _ in 0..12 {
                scope.spawn(|| {
                    loop {
                        let before = !signalled.load(Ordering::SeqCst);
                        let outcome = ask(&address, place.fetch_add(1, Ordering::Relaxed));
                        let mut got = got.lock().unwrap_or_else(PoisonError::into_inner);
                        got.push((before, outcome));
                        if outcome != Got::Answer {
                            break;
                        }
                    }
                });
            }
            std::thread::sleep(Duration::from_secs_f64(0.05 + 0.4 * random(30, round)));
            in_flight = server.get("/load").1["server_load"].as_u64().unwrap();
            server.signal("TERM");
            signalled.store(true, Ordering::SeqCst);
        });
        let started = Instant::now();
        assert!(server.wait().success());
        slowest = slowest.max(started.elapsed());
        at_once += in_flight;
        for (before, outcome) in got.into_inner().unwrap_or_else(PoisonError::into_inner) {
            // One that was on its way when the signal came is answered, or told so.
            let fine = match outcome {
                Got::Answer | Got::Refusal => true,
                Got::Nothing => !before,
                Got::Torn => false,
            };
            assert!(
                fine,
                "round {round}: {outcome:?}, sent before the signal: {before}"
            );
            *all.entry((outcome, before)).or_insert(0) += 1;
        }
    }
    let answers: usize = [true, false]
        .iter()
        .filter_map(|&before| all.get(&(Got::Answer, before)))
        .sum();
    assert!(
        answers >= count && at_once >= count as u64,
        "{all:?}, {at_once} in flight"
    );
    eprintln!(
        "{count} times SIGTERM under load, {at_once} requests in flight with it: (outcome, sent before) {all:?}; \
         the process was gone at most {:.2} s after its last client",
        slowest.as_secs_f64()
    );
}

/// A connection that dawdles over its head, its body or the answer.
fn slow_client(address: &str, index: usize) -> TcpStream {
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\n";
    let text = match index % 3 {
        0 => format!("{head}x-slow: "),
        1 => format!("{head}content-length: 90000\r\n\r\n{{\"a\": \""),
        _ => {
            let body =
                json!({"prompt": "Hi", "max_tokens": 20, "stream": true, "ignore_eos": true})
                    .to_string();
            format!("{head}content-length: {}\r\n\r\n{body}", body.len())
        }
    };
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    stream
}

#[test]
fn slow_clients_are_nobodys_trouble() {
    let count = times(500, 60);
    let model = ChatModel::with_context(1, 2048);
    let server = Running::start(
        model.path(),
        &["--header-timeout", "20", "--body-timeout", "20"],
    );
    let body = json!({"messages": user("Hi"), "best_of": 4, "max_tokens": 200, "seed": 1, "ignore_eos": true});
    let answer_s = || {
        let mut seconds: Vec<f64> = (0..15)
            .map(|_| {
                let started = Instant::now();
                server.answer("/v1/chat/completions", body.clone());
                started.elapsed().as_secs_f64()
            })
            .collect();
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    };
    let idle = answer_s();

    // A third sends its head byte by byte, a third its body, a third reads nothing of its stream.
    let mut slow: Vec<TcpStream> = (0..count)
        .map(|index| slow_client(&server.address, index))
        .collect();
    server.wait_for("the readers' candidates to end", || {
        server.get("/load").1["candidates"] == 0
    });
    let going = AtomicBool::new(true);
    let (crowded, least) = std::thread::scope(|scope| {
        let drip = scope.spawn(|| {
            let mut least = count;
            while going.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(200));
                let writers = slow.iter_mut().enumerate();
                let alive = writers
                    .filter_map(|(index, stream)| {
                        (index % 3 == 2 || stream.write_all(b"a").is_ok()).then_some(())
                    })
                    .count();
                least = least.min(alive);
            }
            least
        });
        std::thread::sleep(Duration::from_millis(300));
        let crowded = answer_s();
        going.store(false, Ordering::Relaxed);
        (crowded, drip.join().unwrap())
    });
    // They were all there while it was measured.
    assert_eq!(least, count);
    let ratio = crowded / idle;
    eprintln!(
        "{count} slow connections: a request takes {:.1} ms, {:.1} ms without them, {ratio:.2} times",
        crowded * 1e3,
        idle * 1e3
    );
    // The short form runs beside other tests, whose load is not the server's doing.
    if std::env::var_os("PODIUM_SOAK").is_some() {
        assert!(ratio <= 2.0);
    }
    server.wait_until_idle();
}
