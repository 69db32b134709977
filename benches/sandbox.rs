//! An ordinary program in the sandbox: alone, behind a set of hostile ones, and while they run.
//!
//! Behind them it should take as long as before: nothing of them is left. While one runs, it takes what
//! its limits leave it: processor time that others wait for, where there are fewer cores than programs.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use podium::tasks::sandbox::python::Python;
use podium::tasks::sandbox::{Ending, Limits, Sandbox};

const LIMITS: Limits = Limits {
    cpu_time: Duration::from_secs(1),
    wall_time: Duration::from_secs(3),
    memory: 256 << 20,
    processes: 8,
    output: 64 << 10,
    scratch: 4 << 20,
};
const ORDINARY: &str = "print(sum(x * x for x in range(1000)))";
const HOSTILE: [&str; 8] = [
    "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
    "while True: pass",
    "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "f = open('/etc/stolen', 'w')",
    "import socket\nsocket.create_connection(('127.0.0.1', 80), 1)",
    "print(open('/etc/shadow').read())",
    "while True: print('x' * 1000)",
    "import os, signal\nwhile True: os.kill(os.getppid(), signal.SIGKILL)",
];

fn run(python: &Python, sandbox: &Sandbox, program: &str) -> Ending {
    let arguments = ["-S", "-s", "-B", "-X", "utf8", "-c", program];
    let finished = sandbox.run(&python.executable, &arguments, b"");
    finished.expect("the sandbox starts").ending
}

fn sandbox(criterion: &mut Criterion) {
    let python = Python::find(Path::new("python3")).expect("there is a python3");
    let sandbox = Sandbox::new(LIMITS, &python.reads).expect("this machine has a sandbox");
    let ordinary = || assert_eq!(run(&python, &sandbox, ORDINARY), Ending::Exited(0));
    let mut group = criterion.benchmark_group("sandbox");
    group.bench_function("alone", |bencher| bencher.iter(ordinary));
    for program in HOSTILE {
        run(&python, &sandbox, program);
    }
    group.bench_function("behind the hostile set", |bencher| bencher.iter(ordinary));
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for program in HOSTILE.iter().cycle() {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                run(&python, &sandbox, program);
            }
        });
        group.bench_function("beside the hostile set", |bencher| bencher.iter(ordinary));
        over.store(true, Ordering::Relaxed);
    });
    group.finish();
}

criterion_group!(benches, sandbox);
criterion_main!(benches);
