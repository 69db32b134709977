//! Hostile programs in the sandbox: none gets out, none leaves a trace, none slows down what follows.
//!
//! Each is run by every mechanism that works on this machine; one that does not says so.

#![cfg(target_os = "linux")]

use std::net::TcpListener;
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use podium::tasks::sandbox::python::Python;
use podium::tasks::sandbox::{Ending, Finished, Limits, Mechanism, Sandbox};

/// Small, so that the tests are quick.
const LIMITS: Limits = Limits {
    cpu_time: Duration::from_secs(1),
    wall_time: Duration::from_secs(6),
    memory: 256 << 20,
    processes: 8,
    output: 64 << 10,
    scratch: 4 << 20,
};

static PYTHON: LazyLock<Option<Python>> =
    LazyLock::new(|| match Python::find(Path::new("python3")) {
        Ok(python) => Some(python),
        Err(error) => {
            eprintln!("NOT RUN: {error}");
            None
        }
    });

/// The sandboxes of this machine.
fn sandboxes() -> Vec<Sandbox> {
    let Some(python) = &*PYTHON else {
        return Vec::new();
    };
    [Mechanism::Namespaces, Mechanism::Landlock]
        .into_iter()
        .filter_map(
            |mechanism| match Sandbox::with(mechanism, LIMITS, &python.reads) {
                Ok(sandbox) => Some(sandbox),
                Err(error) => {
                    eprintln!("NOT RUN with {mechanism:?}: {error}");
                    None
                }
            },
        )
        .collect()
}

fn run(sandbox: &Sandbox, program: &str) -> Finished {
    let python = PYTHON.as_ref().unwrap();
    let arguments = ["-S", "-s", "-B", "-X", "utf8", "-c", program];
    sandbox
        .run(&python.executable, &arguments, b"input\n")
        .unwrap()
}

/// What a program says in each sandbox, with how it ended.
fn everywhere(program: &str, check: impl Fn(Mechanism, Ending, &str)) {
    for sandbox in sandboxes() {
        let finished = run(&sandbox, program);
        let text = String::from_utf8_lossy(&finished.output);
        check(sandbox.mechanism(), finished.ending, &text);
    }
}

/// A program that ends each attempt with "refused" or "DONE".
fn refused(attempts: &str) {
    let program = format!(
        "import os, sys\ndef attempt(f, *a):\n try:\n  f(*a); print('DONE', f, a)\n except (OSError, MemoryError) as e: print('refused', e)\n{attempts}"
    );
    everywhere(&program, |mechanism, ending, text| {
        assert_eq!(ending, Ending::Exited(0), "{mechanism:?}: {text}");
        assert!(
            text.contains("refused") && !text.contains("DONE"),
            "{mechanism:?}: {text}"
        );
    });
}

#[test]
fn an_ordinary_program_runs() {
    let program = "import sys, re, math, collections, itertools, json, random, datetime, decimal, threading\n\
         open('notes', 'w').write('x' * 1000)\n\
         t = threading.Thread(target=lambda: print('thread')); t.start(); t.join(); sys.stdout.flush()\n\
         print(sys.stdin.read().strip(), len(open('notes').read()), file=sys.stderr)\n\
         sys.exit(3)";
    everywhere(program, |mechanism, ending, text| {
        assert_eq!(ending, Ending::Exited(3), "{mechanism:?}: {text}");
        assert_eq!(text, "thread\ninput 1000\n", "{mechanism:?}");
    });
}

#[test]
fn the_same_program_runs_the_same_way() {
    let program = "print([hash(str(i)) for i in range(9)], list({str(i) for i in range(99)}))";
    for sandbox in sandboxes() {
        assert_eq!(run(&sandbox, program).output, run(&sandbox, program).output);
    }
}

#[test]
fn nothing_is_left_from_one_run_to_the_next() {
    everywhere("open('trace', 'w').write('x')", |_, ending, text| {
        assert_eq!(ending, Ending::Exited(0), "{text}");
    });
    everywhere("import os; print(os.listdir('.'))", |_, _, text| {
        assert_eq!(text, "[]\n")
    });
}

#[test]
fn files_cannot_be_read() {
    let secret = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&secret, "secret").unwrap();
    refused(&format!(
        "for path in ['/etc/passwd', '/etc/shadow', '/etc/hostname', '/proc/self/environ', '/proc/1/environ', \
         '/proc/self/maps', '/sys/kernel/osrelease', '{}', '/dev/mem', '/dev/kmsg', '../../etc/passwd']: \
         attempt(lambda: open(path).read())\n\
         for path in ['/home', '/root/.ssh', '/proc', '/etc/ssh', '/tmp', '/var']: attempt(os.listdir, path)",
        secret.path().display()
    ));
}

#[test]
fn files_cannot_be_written() {
    let folder = tempfile::tempdir().unwrap();
    let bait = folder.path().join("bait");
    std::fs::write(&bait, "as it was").unwrap();
    let traces = [
        "/tmp/podium-trace",
        "/var/tmp/podium-trace",
        "/dev/shm/podium-trace",
    ];
    let python = PYTHON.as_ref().map(|python| python.executable.clone());
    refused(&format!(
        "for path in ['{bait}', '/podium-trace', '{}', '/usr/lib/podium-trace', '{python}']: attempt(open, path, 'w')\n\
         for path in ['{bait}', '{python}']:\n\
         \x20attempt(os.truncate, path, 0); attempt(os.unlink, path); attempt(os.chmod, path, 0o755); attempt(os.utime, path, (1, 1)); attempt(os.chown, path, 0, 0); attempt(os.setxattr, path, 'user.x', b'1'); attempt(os.rename, path, 'x')\n\
         attempt(os.link, '{bait}', 'x'); attempt(os.mkdir, '/podium-trace'); attempt(os.symlink, '/', '/podium-trace')\n\
         attempt(os.mknod, '/podium-trace')",
        traces.join("', '"),
        bait = bait.display(),
        python = python.unwrap_or_default().display(),
    ));
    assert_eq!(std::fs::read_to_string(&bait).unwrap(), "as it was");
    for path in traces
        .iter()
        .chain(&["/podium-trace", "/usr/lib/podium-trace"])
    {
        assert!(!Path::new(path).exists(), "{path}");
    }
}

#[test]
fn the_environment_is_empty() {
    // Python itself sets LC_CTYPE where there is no locale.
    let program =
        "import os; print([f'{k}={v}' for k, v in os.environ.items() if k != 'LC_CTYPE'])";
    everywhere(program, |_, _, text| {
        assert_eq!(text, "['PYTHONHASHSEED=0']\n");
    });
}

#[test]
fn there_is_no_network() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    refused(&format!(
        "import socket\n\
         for family in [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET]:\n\
         \x20for kind in [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW]: attempt(socket.socket, family, kind)\n\
         attempt(socket.create_connection, ('127.0.0.1', {port}), 1)\n\
         attempt(socket.getaddrinfo, 'example.com', 80)"
    ));
    assert!(listener.accept().is_err(), "somebody connected");
}

#[test]
fn a_fork_bomb_stays_small() {
    let before = processes();
    let program = "import os\nwhile True:\n try: os.fork()\n except OSError: pass";
    everywhere(program, |mechanism, ending, text| {
        // Every process ends at its limit of time, or the first one does, which ends all.
        assert_ne!(ending, Ending::Exited(0), "{mechanism:?}: {text}");
    });
    assert!(
        processes() < before + 20,
        "{before} processes before, {} after",
        processes()
    );
    everywhere("print(6 * 7)", |_, _, text| assert_eq!(text, "42\n"));
}

fn processes() -> usize {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok())
        .count()
}

#[test]
fn a_child_does_not_outlive_its_program() {
    let program = "import os, time\n\
         try: child = os.fork()\n\
         except OSError: child = 1; print('no child')\n\
         if child == 0:\n\
         \x20os.setsid()\n\
         \x20while True: time.sleep(0.01); print('still here', flush=True)\n\
         time.sleep(0.1)";
    let started = Instant::now();
    everywhere(program, |mechanism, ending, text| {
        assert_eq!(ending, Ending::Exited(0), "{mechanism:?}");
        assert!(
            text.contains("still here") || text == "no child\n",
            "{mechanism:?}: {text}"
        );
    });
    assert!(
        started.elapsed() < LIMITS.wall_time,
        "nobody had to be waited for"
    );
}

#[test]
fn an_endless_loop_ends() {
    everywhere("while True: pass", |_, ending, _| {
        assert!(matches!(ending, Ending::Exited(129..) | Ending::TimedOut))
    });
    let catches = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass";
    everywhere(catches, |_, ending, _| {
        // On a machine that is busy, time may be up first.
        assert!(matches!(ending, Ending::Exited(137) | Ending::TimedOut))
    });
    let nested = "x = list(range(10**7))\nwhile True: x.sort(key=lambda i: -i)";
    everywhere(nested, |_, ending, _| assert_ne!(ending, Ending::Exited(0)));
}

#[test]
fn a_sleeper_is_woken() {
    let started = Instant::now();
    everywhere("import time; time.sleep(1000)", |_, ending, _| {
        assert_eq!(ending, Ending::TimedOut)
    });
    assert!(started.elapsed() < 3 * LIMITS.wall_time);
}

#[test]
fn much_memory_is_refused() {
    refused(
        "attempt(lambda: bytearray(10 << 30))\n\
         import mmap\n\
         attempt(mmap.mmap, -1, 10 << 30)",
    );
    let grows = "x = []\nwhile True: x.append(bytearray(1 << 20))";
    everywhere(grows, |mechanism, ending, text| {
        assert!(
            text.contains("MemoryError") || ending != Ending::Exited(0),
            "{mechanism:?}: {text}"
        );
    });
}

#[test]
fn a_flood_of_output_is_cut() {
    for program in [
        "while True: print('x' * 1000)",
        "import sys\nwhile True: sys.stderr.write('x' * 100000)",
        "import os\nos.write(1, b'x' * (1 << 20))",
    ] {
        for sandbox in sandboxes() {
            let finished = run(&sandbox, program);
            assert_eq!(finished.ending, Ending::WroteTooMuch);
            assert_eq!(finished.output.len(), LIMITS.output);
        }
    }
}

#[test]
fn the_scratch_folder_is_small() {
    let program = "f = open('big', 'wb')\n\
         try:\n\x20for i in range(100): f.write(b'x' * (1 << 20)); f.flush()\n\
         except OSError as e: print('refused', e.errno)";
    everywhere(program, |mechanism, ending, text| {
        assert_eq!(ending, Ending::Exited(0), "{mechanism:?}: {text}");
        assert!(text.starts_with("refused"), "{mechanism:?}: {text}");
    });
}

#[test]
fn the_parent_is_not_reached_by_signals() {
    let me = std::process::id();
    // Its own processes it may signal where it has a namespace of its own.
    refused(&format!(
        "import signal\n\
         attempt(os.kill, {me}, signal.SIGKILL); attempt(os.kill, {me}, 0)\n\
         if os.getppid() > 1: attempt(os.kill, os.getppid(), signal.SIGKILL)\n\
         attempt(os.sched_setaffinity, {me}, [0]); attempt(os.setpriority, os.PRIO_PROCESS, {me}, 19)\n\
         import resource\n\
         attempt(resource.prlimit, {me}, resource.RLIMIT_NOFILE, (3, 3))"
    ));
    for program in [
        "import os, signal\nos.kill(-1, signal.SIGKILL)",
        "import os, signal\nos.kill(0, signal.SIGKILL)",
        "import os, signal\nos.killpg(os.getpgid(0), signal.SIGTERM)",
        "import os\nos.abort()",
    ] {
        // This process is still here to look at it.
        everywhere(program, |_, _, _| {});
    }
}

#[test]
fn privileges_cannot_be_had() {
    refused(
        "import ctypes\n\
         libc = ctypes.CDLL(None, use_errno=True)\n\
         def call(name, *a):\n\
         \x20if getattr(libc, name)(*a) == -1: raise OSError(ctypes.get_errno(), name)\n\
         attempt(os.setuid, 0) if os.getuid() else None\n\
         attempt(call, 'unshare', 0x10000000)\n\
         attempt(call, 'mount', b'none', b'/scratch', b'tmpfs', 0, None)\n\
         attempt(call, 'chroot', b'.')\n\
         attempt(call, 'ptrace', 16, 1, 0, 0)\n\
         attempt(call, 'sethostname', b'x', 1)\n\
         attempt(call, 'syscall', 425, 8, 0)\n\
         attempt(call, 'syscall', 321, 0, 0, 0)",
    );
    everywhere(
        "import os; print(os.getgroups()); os.execv('/usr/bin/su', ['su'])",
        |_, ending, text| assert!(ending != Ending::Exited(0) || text.is_empty(), "{text}"),
    );
}

#[test]
fn open_files_do_not_leak_in() {
    let secret = tempfile::NamedTempFile::new().unwrap();
    let fd = rustix::io::dup(secret.as_file()).unwrap();
    // As a careless library would have it: inherited by every child.
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).unwrap();
    let program = "import os\nprint([fd for fd in range(3, 1024) if ok(fd)])";
    let program = format!(
        "import os\ndef ok(fd):\n try: os.fstat(fd); return True\n except OSError: return False\n{program}"
    );
    everywhere(&program, |mechanism, _, text| {
        assert_eq!(text, "[]\n", "{mechanism:?}")
    });
}

#[test]
fn many_at_a_time() {
    let sandboxes = sandboxes();
    let Some(sandbox) = sandboxes.first() else {
        return;
    };
    std::thread::scope(|scope| {
        for worker in 0..4 {
            scope.spawn(move || {
                for i in 0..5 {
                    let finished = run(sandbox, &format!("print({worker} * 10 + {i})"));
                    assert_eq!(
                        String::from_utf8_lossy(&finished.output),
                        format!("{}\n", worker * 10 + i)
                    );
                }
            });
        }
    });
}
