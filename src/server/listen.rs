//! Connections: how many, how slow, and how they end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::state::{Phase, Shared};

/// How long answers that are on their way may take to go out, once nothing is computed any more.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Between two looks at whether all is done.
const DRAIN_TICK: Duration = Duration::from_millis(20);
/// After an accept that failed, for want of file descriptors for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Takes connections until the server is told to stop, and until then that what runs has ended.
pub async fn listen(
    listener: TcpListener,
    routes: Router,
    state: Shared,
    stop: impl Future<Output = ()> + Send + 'static,
) {
    let drained = tokio::spawn(drain(state.clone(), stop));
    let (closing, closed) = watch::channel(false);
    let room = Arc::new(Semaphore::new(state.config.max_connections));
    let accept = async {
        loop {
            let Ok(permit) = room.clone().acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, peer)) => {
                    let routes = routes.clone();
                    tokio::spawn(serve(
                        stream,
                        peer,
                        routes,
                        state.clone(),
                        closed.clone(),
                        permit,
                    ));
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be taken");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        () = accept => {}
        _ = drained => {}
    }
    drop(listener);
    closing.send_replace(true);
    drop(closed);
    // Every connection holds a receiver.
    let _ = tokio::time::timeout(LAST_WORDS, closing.closed()).await;
    tracing::info!("stopped");
}

/// Waits for the signal, then for what runs; ends what has not ended in time.
async fn drain(state: Shared, stop: impl Future<Output = ()>) {
    stop.await;
    state.phase.send_replace(Phase::Draining);
    let in_flight = || state.in_flight.load(Ordering::Acquire);
    tracing::info!(
        in_flight = in_flight(),
        "draining: no more requests are taken"
    );
    let idle = async {
        while in_flight() > 0 {
            tokio::time::sleep(DRAIN_TICK).await;
        }
    };
    let timeout = state.config.drain_timeout;
    if tokio::time::timeout(timeout, idle).await.is_err() {
        tracing::warn!(
            in_flight = in_flight(),
            "out of time: what still runs is ended"
        );
        state.phase.send_replace(Phase::Aborting);
        let idle = async {
            while in_flight() > 0 {
                tokio::time::sleep(DRAIN_TICK).await;
            }
        };
        let _ = tokio::time::timeout(LAST_WORDS, idle).await;
    }
}

async fn serve(
    stream: TcpStream,
    peer: SocketAddr,
    routes: Router,
    state: Shared,
    mut closed: watch::Receiver<bool>,
    _permit: OwnedSemaphorePermit,
) {
    let config = &state.config;
    // Events are small, and wanted now.
    let _ = stream.set_nodelay(true);
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        // From the first byte that is awaited: it cuts slow heads and idle connections alike.
        .header_read_timeout(config.header_timeout)
        .max_buf_size(config.max_header_bytes)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = async { drop(closed.wait_for(|closed| *closed).await) } => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "a connection broke off");
    }
}
