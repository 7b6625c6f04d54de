//! The log: to standard error, or to a file that may rotate.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use log::{Level, LevelFilter, Log, Metadata, Record};

/// How many full files rotation keeps.
const KEPT: u32 = 10;

/// The last error logged, which the library may have kept to itself otherwise.
static LAST_ERROR: Mutex<String> = Mutex::new(String::new());

pub fn last_error() -> String {
    LAST_ERROR.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Installs the log, and sends panics there. A `limit` of 0 never rotates.
pub fn init(level: LevelFilter, path: Option<&Path>, limit: u64) -> Result<(), String> {
    let sink = match path {
        None => Sink::Stderr,
        Some(path) => {
            let mut path = path.to_path_buf();
            if path.extension().is_none() {
                path.set_extension("log");
            }
            Sink::File(
                Rotating::open(path.clone(), limit).map_err(|e| format!("open log file {}: {e}", path.display()))?,
            )
        }
    };
    log::set_boxed_logger(Box::new(Logger(Mutex::new(sink)))).map_err(|e| e.to_string())?;
    log::set_max_level(level);
    std::panic::set_hook(Box::new(|panic| {
        log::error!("{panic}");
        let trace = Backtrace::capture(); // if RUST_BACKTRACE asks for it
        if trace.status() == BacktraceStatus::Captured {
            log::error!("{trace}");
        }
    }));
    Ok(())
}

struct Logger(Mutex<Sink>);

enum Sink {
    Stderr,
    File(Rotating),
}

impl Log for Logger {
    // log itself drops what is beyond its maximum level, which PUT /api/v1/daemon
    // can change.
    fn enabled(&self, _: &Metadata) -> bool {
        true
    }

    fn log(&self, r: &Record) {
        let place = r.module_path().unwrap_or_else(|| r.target());
        // nydus_api::error repeats errors with their place in the sources.
        if r.level() == Level::Error && place != "nydus_api::error" {
            *LAST_ERROR.lock().unwrap_or_else(PoisonError::into_inner) = r.args().to_string();
        }
        let line = format!("[{}] {} [{place}:{}] {}\n", now(), r.level(), r.line().unwrap_or(0), r.args());
        // Nowhere is left to report to when the log cannot be written.
        let _ = match &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            // In one write, so that lines of several processes do not mix.
            Sink::Stderr => io::stderr().write_all(line.as_bytes()),
            Sink::File(f) => f.write(line.as_bytes()),
        };
    }

    fn flush(&self) {}
}

struct Rotating {
    path: PathBuf,
    file: File,
    size: u64,
    limit: u64,
}

impl Rotating {
    fn open(path: PathBuf, limit: u64) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        let size = file.metadata()?.len();
        Ok(Rotating { path, file, size, limit })
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if self.limit > 0 && self.size > 0 && self.size + line.len() as u64 > self.limit {
            self.rotate();
        }
        self.file.write_all(line)?;
        self.size += line.len() as u64;
        Ok(())
    }

    /// Makes x.log to x.log.1, that to x.log.2 and so on. When it fails the old
    /// file goes on growing: better than a log that ends.
    fn rotate(&mut self) {
        let numbered = |n: u32| {
            let mut name = self.path.clone().into_os_string();
            name.push(format!(".{n}"));
            PathBuf::from(name)
        };
        for n in (1..KEPT).rev() {
            let _ = fs::rename(numbered(n), numbered(n + 1));
        }
        let _ = fs::rename(&self.path, numbered(1));
        if let Ok(fresh) = Rotating::open(self.path.clone(), self.limit) {
            *self = fresh;
        }
    }
}

/// The time in UTC, without a crate for calendars.
fn now() -> String {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs() as libc::time_t;
    // SAFETY: gmtime_r reads and writes only what it is given; all zeros is a valid tm.
    let t = unsafe {
        let mut t: libc::tm = std::mem::zeroed();
        libc::gmtime_r(&seconds, &mut t);
        t
    };
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}.{:06} +00:00",
        t.tm_year + 1900,
        t.tm_mon + 1,
        t.tm_mday,
        t.tm_hour,
        t.tm_min,
        t.tm_sec,
        since.subsec_micros()
    )
}
