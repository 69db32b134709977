//! A server that runs, and ways to talk to it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub struct Running {
    child: Child,
    /// Such as `127.0.0.1:40123`.
    pub address: String,
    pub key: Option<String>,
}

/// Longer than anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(60);

impl Running {
    pub fn start(model: &Path, options: &[&str]) -> Running {
        let mut child = Command::new(env!("CARGO_BIN_EXE_podium"))
            .args(["serve", "--port", "0", "--model"])
            .arg(model)
            .args(options)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://");
        let address = address.unwrap_or_else(|| panic!("the server said {line:?}"));
        let position = options.iter().position(|option| *option == "--api-key");
        Running {
            child,
            address: address.to_string(),
            key: position.map(|place| options[place + 1].to_string()),
        }
    }

    fn agent(&self) -> ureq::Agent {
        ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(PATIENCE))
            .build()
            .into()
    }

    fn authorization(&self) -> String {
        format!("Bearer {}", self.key.as_deref().unwrap_or("none"))
    }

    pub fn get_text(&self, path: &str) -> (u16, String) {
        let url = format!("http://{}{path}", self.address);
        let request = self
            .agent()
            .get(url)
            .header("authorization", self.authorization());
        let mut response = request.call().unwrap();
        let status = response.status().as_u16();
        (status, response.body_mut().read_to_string().unwrap())
    }

    pub fn get(&self, path: &str) -> (u16, Value) {
        let (status, text) = self.get_text(path);
        (status, serde_json::from_str(&text).unwrap())
    }

    pub fn delete(&self, path: &str) -> (u16, Value) {
        let url = format!("http://{}{path}", self.address);
        let request = self
            .agent()
            .delete(url)
            .header("authorization", self.authorization());
        let mut response = request.call().unwrap();
        let status = response.status().as_u16();
        (status, response.body_mut().read_json().unwrap())
    }

    pub fn post_bytes(&self, path: &str, body: &[u8]) -> (u16, String) {
        let url = format!("http://{}{path}", self.address);
        let request = self
            .agent()
            .post(url)
            .header("authorization", self.authorization());
        let mut response = request.send(body).unwrap();
        let status = response.status().as_u16();
        (status, response.body_mut().read_to_string().unwrap())
    }

    pub fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, text) = self.post_bytes(path, body.to_string().as_bytes());
        let value = serde_json::from_str(&text);
        (
            status,
            value.unwrap_or_else(|error| panic!("{error}: {text}")),
        )
    }

    /// The body of an answer that must be good.
    pub fn answer(&self, path: &str, body: Value) -> Value {
        let (status, value) = self.post(path, &body);
        assert_eq!(status, 200, "{path} {body}: {value}");
        value
    }

    /// The events of a stream, (name, data) each, `[DONE]` as a string.
    pub fn events(&self, path: &str, body: &Value) -> Vec<(String, Value)> {
        let (status, text) = self.post_bytes(path, body.to_string().as_bytes());
        assert_eq!(status, 200, "{text}");
        parse_events(&text)
    }

    /// A connection with a request on its way.
    pub fn open(&self, path: &str, body: &Value) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let body = body.to_string();
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: {}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            self.authorization(),
            body.len(),
        )
        .unwrap();
        stream
    }

    /// A figure of `/metrics`, by its name and, where it has several, a label: `name{label="value"}`.
    pub fn metric(&self, figure: &str) -> f64 {
        let (status, text) = self.get_text("/metrics");
        assert_eq!(status, 200);
        let (name, label) = figure.split_once('{').unwrap_or((figure, "}"));
        let label = label.trim_end_matches('}');
        let number = text.lines().find_map(|line| {
            let (labels, number) = line
                .strip_prefix(name)?
                .strip_prefix('{')?
                .split_once("} ")?;
            labels.contains(label).then_some(number)
        });
        number
            .unwrap_or_else(|| panic!("no {figure} in:\n{text}"))
            .parse()
            .unwrap()
    }

    /// Waits until the figures say that nothing runs and no page is held but by kept prompts.
    pub fn wait_until_idle(&self) {
        self.wait_for("all pages free", || {
            self.metric("vllm:num_requests_running") == 0.0
                && self.metric("vllm:num_requests_waiting") == 0.0
                && self.metric("podium_kv_pages_used") == self.metric("podium_kv_pages_cached")
        });
    }

    pub fn wait_for(&self, what: &str, condition: impl Fn() -> bool) {
        let started = Instant::now();
        while !condition() {
            assert!(started.elapsed() < PATIENCE, "waited in vain for: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill")
            .args(["-s", name, &pid])
            .status()
            .unwrap();
        assert!(sent.success());
    }

    pub fn wait(mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(started.elapsed() < PATIENCE, "the server does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is left of an answer, headers included.
pub fn rest(mut stream: TcpStream) -> String {
    let mut text = Vec::new();
    // A connection that is cut may end with a reset.
    let _ = stream.read_to_end(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}

pub fn parse_events(text: &str) -> Vec<(String, Value)> {
    let mut events = Vec::new();
    for block in text.split("\n\n") {
        let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name));
        let Some(data) = field("data: ") else {
            continue;
        };
        let name = field("event: ").unwrap_or_default().to_string();
        let value = match data {
            "[DONE]" => json!("[DONE]"),
            data => serde_json::from_str(data).unwrap(),
        };
        events.push((name, value));
    }
    events
}

/// Of an answer, what does not differ from one time to the next.
pub fn outcome(answer: &Value) -> Value {
    let result = &answer["podium"]["results"][0];
    json!([answer["choices"], result["candidates"], result["selected"]])
}

/// A chat of one message.
pub fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

/// The fields of `more` over those of `base`.
pub fn with(base: &Value, more: Value) -> Value {
    let mut all = base.clone();
    let fields = all.as_object_mut().unwrap();
    fields.extend(more.as_object().unwrap().clone());
    all
}
