//! Verification beside generation: candidates are judged by threads of their own while the model
//! writes the next ones, and items come out in the order in which they went in.

use std::collections::{HashMap, VecDeque};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::verify::{Verdict, Verify, VerifyError};

/// Items that may wait for verdicts before the one who hands them in has to.
const MOST_WAITING: usize = 32;

/// One candidate to judge.
struct Job {
    item: u64,
    /// Its place among the distinct texts of the item.
    text: usize,
    verifier: Arc<dyn Verify>,
    candidate: String,
}

type Judged = (u64, usize, Result<Verdict, VerifyError>);

/// Threads that judge candidates. `T` is what belongs to an item and is handed back with its
/// verdicts.
pub struct Judges<T> {
    jobs: Option<Sender<Job>>,
    judged: Receiver<Judged>,
    threads: Vec<thread::JoinHandle<()>>,
    waiting: VecDeque<Waiting<T>>,
    next: u64,
}

struct Waiting<T> {
    what: T,
    /// For each candidate, its text's place.
    texts: Vec<usize>,
    verdicts: Vec<Option<Verdict>>,
    missing: usize,
}

impl<T> Judges<T> {
    pub fn new(threads: usize) -> Judges<T> {
        let (jobs, queue) = channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        let (sender, judged) = channel();
        let work = |_| {
            let (queue, sender) = (queue.clone(), sender.clone());
            thread::spawn(move || {
                loop {
                    // Nothing that the lock guards can be left half done.
                    let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(job) = job else { return };
                    let verdict = job.verifier.verify(&job.candidate);
                    if sender.send((job.item, job.text, verdict)).is_err() {
                        return;
                    }
                }
            })
        };
        Judges {
            threads: (0..threads.max(1)).map(work).collect(),
            jobs: Some(jobs),
            judged,
            waiting: VecDeque::new(),
            next: 0,
        }
    }

    /// Items that have been handed in and not out.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Hands in an item; candidates with the same text are judged once.
    pub fn hand_in(&mut self, what: T, verifier: Box<dyn Verify>, candidates: &[String]) {
        let verifier: Arc<dyn Verify> = Arc::from(verifier);
        let mut place_of: HashMap<&String, usize> = HashMap::new();
        let mut texts = Vec::with_capacity(candidates.len());
        for candidate in candidates {
            let count = place_of.len();
            let place = *place_of.entry(candidate).or_insert(count);
            texts.push(place);
            if place == count
                && let Some(jobs) = &self.jobs
            {
                let job = Job {
                    item: self.next,
                    text: place,
                    verifier: verifier.clone(),
                    candidate: candidate.clone(),
                };
                // The threads hold the queue's other end for as long as this is here.
                let _ = jobs.send(job);
            }
        }
        self.waiting.push_back(Waiting {
            what,
            verdicts: vec![None; place_of.len()],
            missing: place_of.len(),
            texts,
        });
        self.next += 1;
    }

    /// The first item, if it is judged; waits for it where too many wait.
    pub fn hand_out(&mut self) -> Result<Option<(T, Vec<Verdict>)>, VerifyError> {
        while let Ok(judged) = self.judged.try_recv() {
            self.note(judged)?;
        }
        match self.waiting.len() > MOST_WAITING {
            true => self.wait(),
            false => Ok(self.first()),
        }
    }

    /// The first item, once it is judged; `None` where there is none.
    pub fn wait(&mut self) -> Result<Option<(T, Vec<Verdict>)>, VerifyError> {
        while self.waiting.front().is_some_and(|first| first.missing > 0) {
            let Ok(judged) = self.judged.recv() else {
                break;
            };
            self.note(judged)?;
        }
        Ok(self.first())
    }

    fn note(&mut self, (item, text, verdict): Judged) -> Result<(), VerifyError> {
        let first = self.next - self.waiting.len() as u64;
        let waiting = &mut self.waiting[(item - first) as usize];
        waiting.verdicts[text] = Some(verdict?);
        waiting.missing -= 1;
        Ok(())
    }

    fn first(&mut self) -> Option<(T, Vec<Verdict>)> {
        let judged = self.waiting.front().is_some_and(|first| first.missing == 0);
        let first = self.waiting.pop_front_if(|_| judged)?;
        let verdicts = first
            .texts
            .iter()
            .filter_map(|&text| first.verdicts[text].clone());
        Some((first.what, verdicts.collect()))
    }
}

impl<T> Drop for Judges<T> {
    fn drop(&mut self) {
        // What nobody will look at is not judged: the queue is emptied by its receivers' end.
        self.jobs = None;
        self.waiting.clear();
        let (_, nobody) = channel();
        self.judged = nobody;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use std::time::Duration;

    struct Even {
        asked: Arc<AtomicUsize>,
    }

    impl Verify for Even {
        fn verify(&self, candidate: &str) -> Result<Verdict, VerifyError> {
            self.asked.fetch_add(1, SeqCst);
            let number: u64 = candidate.parse().map_err(|_| VerifyError::NoCommand)?;
            thread::sleep(Duration::from_micros(number % 7 * 100));
            Ok(Verdict {
                label: (number % 2) as f32,
                answer: Some(candidate.to_string()),
            })
        }
    }

    #[test]
    fn items_come_out_in_order_with_all_verdicts() {
        let asked = Arc::new(AtomicUsize::new(0));
        let mut judges = Judges::new(4);
        let mut out = Vec::new();
        for item in 0..200u64 {
            let candidates: Vec<String> = (0..item % 5).map(|k| (item * k).to_string()).collect();
            let verifier = Even {
                asked: asked.clone(),
            };
            judges.hand_in(item, Box::new(verifier), &candidates);
            out.extend(judges.hand_out().unwrap());
            assert!(judges.waiting() <= MOST_WAITING);
        }
        while let Some(judged) = judges.wait().unwrap() {
            out.push(judged);
        }
        assert_eq!(out.len(), 200);
        for (number, (item, verdicts)) in out.iter().enumerate() {
            assert_eq!(*item, number as u64);
            let expected: Vec<String> = (0..item % 5).map(|k| (item * k).to_string()).collect();
            let answers: Vec<String> = verdicts.iter().flat_map(|v| v.answer.clone()).collect();
            assert_eq!(answers, expected);
        }
    }

    #[test]
    fn equal_candidates_are_judged_once() {
        let asked = Arc::new(AtomicUsize::new(0));
        let mut judges = Judges::new(2);
        let candidates = ["3", "4", "3", "3", "4"].map(str::to_string);
        judges.hand_in(
            (),
            Box::new(Even {
                asked: asked.clone(),
            }),
            &candidates,
        );
        let (_, verdicts) = judges.wait().unwrap().unwrap();
        let labels: Vec<f32> = verdicts.iter().map(|v| v.label).collect();
        assert_eq!(labels, [1.0, 0.0, 1.0, 1.0, 0.0]);
        assert_eq!(asked.load(SeqCst), 2);
        assert!(judges.wait().unwrap().is_none());
    }

    #[test]
    fn an_error_comes_out() {
        let asked = Arc::new(AtomicUsize::new(0));
        let mut judges = Judges::new(2);
        judges.hand_in((), Box::new(Even { asked }), &["x".to_string()]);
        assert!(judges.wait().is_err());
    }
}
