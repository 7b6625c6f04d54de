//! HTTP over the unix socket: nydus-api's endpoints on dbs-uhttp's server.
//!
//! nydus-api has a thread for this too, but one that can be stopped only between
//! an answer and its sending: who asks for /exit would hear nothing.

use std::cell::Cell;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{fs, io, thread};

use dbs_uhttp::{Body, HttpServer, MediaType, Request, Response, ServerError, StatusCode, Version};
use log::{debug, error};
use nydus_api::{ApiRequest, HttpError, HTTP_ROUTES};

use crate::api::Api;

/// The socket's file, which goes when this is dropped.
pub struct Socket {
    path: PathBuf,
    /// Device and inode number: a successor may have made its own there since.
    id: (u64, u64),
}

impl Drop for Socket {
    fn drop(&mut self) {
        if identify(&self.path).is_ok_and(|id| id == self.id) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identify(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|m| (m.dev(), m.ino()))
}

/// Answers requests at `path` from a thread of its own. `exited` is called once
/// a successful /exit has been answered.
pub fn start(path: &Path, api: Api, exited: impl Fn() + Send + 'static) -> Result<Socket, String> {
    let describe = |what: String| format!("listen on {}: {what}", path.display());
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(describe(e.to_string())),
        _ => {}
    }
    let mut server = HttpServer::new(path).map_err(|e| describe(plain(e)))?;
    let socket = Socket { path: path.into(), id: identify(path).map_err(|e| describe(e.to_string()))? };
    server.start_server().map_err(|e| describe(plain(e)))?;
    thread::Builder::new()
        .name("api".into())
        .spawn(move || loop {
            // Blocks until there is something to do.
            match server.requests() {
                Ok(requests) => {
                    for request in requests {
                        let exit = Cell::new(false);
                        let answer = request.process(|r| respond(r, &api, &exit));
                        if let Err(e) = server.respond(answer) {
                            error!("API: send answer: {}", plain(e));
                        }
                        if exit.get() {
                            server.flush_outgoing_writes();
                            exited();
                        }
                    }
                }
                // One client's fault, and not the next one's.
                Err(e) => error!("API: {}", plain(e)),
            }
        })
        .map_err(|e| describe(e.to_string()))?;
    Ok(socket)
}

fn respond(request: &Request, api: &Api, exit: &Cell<bool>) -> Response {
    let uri = request.uri().get_abs_path();
    let path = uri.split('?').next().unwrap_or_default();
    let mut response = match HTTP_ROUTES.routes.get(path) {
        None => failure(StatusCode::NotFound, HttpError::NoRoute),
        Some(endpoint) => endpoint
            .handle_request(request, &|r| {
                let is_exit = matches!(r, ApiRequest::Exit);
                let answer = api.handle(r);
                exit.set(is_exit && answer.is_ok());
                answer
            })
            .unwrap_or_else(|e| failure(StatusCode::BadRequest, e)),
    };
    response.set_server("Nydus API");
    response.set_content_type(MediaType::ApplicationJson);
    debug!("API: {:?} {uri}: {:?}", request.method(), response.status());
    response
}

/// An error in the form that the endpoints themselves use.
fn failure(status: StatusCode, e: HttpError) -> Response {
    let mut r = Response::new(Version::Http11, status);
    let body = serde_json::json!({"code": "UNDEFINED", "message": format!("{e:?}")});
    r.set_body(Body::new(body.to_string()));
    r
}

fn plain(e: ServerError) -> String {
    match e {
        ServerError::IOError(e) => e.to_string(),
        e => format!("{e:?}"),
    }
}
