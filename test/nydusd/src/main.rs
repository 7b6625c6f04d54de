//! A command line for nydusd's libraries: it starts a daemon, serves its API and
//! ends it. See README.md.

mod api;
mod cli;
mod fuse;
mod logging;
mod server;
mod version;

use std::io;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use clap::Parser;
use log::{error, info};
use nydus_service::daemon::DaemonController;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let common = cli.command.common();
    let result =
        logging::init(common.log_level, common.log_file.as_deref(), common.log_rotation_size << 20).and_then(|()| {
            info!("nydusd {} starts, pid {}", version::info().package_ver, std::process::id());
            run(&cli.command)
        });
    match result {
        Ok(()) => {
            info!("nydusd ends");
            ExitCode::SUCCESS
        }
        Err(e) => {
            error!("{e}");
            // The one line for who started it, wherever the log goes.
            if common.log_file.is_some() || log::max_level() < log::Level::Error {
                eprintln!("nydusd: {e}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(command: &cli::Command) -> Result<(), String> {
    let common = command.common();
    limit_files(common.rlimit_nofile)?;
    let controller = Arc::new(DaemonController::new());
    end_on_signals(&controller)?;
    let daemon = match command {
        cli::Command::Fuse(args) => fuse::start(args, &controller)?,
    };
    controller.set_daemon(daemon.clone());
    let socket = common.apisock.as_deref().map(|path| {
        let exited = controller.clone();
        server::start(path, api::Api::new(daemon), move || exited.notify_shutdown())
    });
    let socket = socket.transpose();
    if socket.is_ok() {
        // Until the filesystem is gone, /exit was called or a signal came.
        controller.run_loop();
    }
    // Unmounts, unless /exit was called. Known of the library: after a signal it
    // waits here for ever if the mount had been detached while in use.
    controller.shutdown();
    socket.map(drop)
}

fn limit_files(n: u64) -> Result<(), String> {
    if n == 0 {
        return Ok(());
    }
    let limit = libc::rlimit { rlim_cur: n, rlim_max: n };
    // SAFETY: the call reads the structure and nothing else.
    match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } {
        0 => Ok(()),
        _ => Err(format!("set the limit of open files to {n}: {}", io::Error::last_os_error())),
    }
}

/// What a signal ends.
static CONTROLLER: OnceLock<Arc<DaemonController>> = OnceLock::new();

/// Makes SIGINT and SIGTERM end the daemon. It does not unblock them: who starts
/// it with them blocked wants it to outlive them.
fn end_on_signals(controller: &Arc<DaemonController>) -> Result<(), String> {
    // A write to an eventfd and atomic operations: allowed in a signal handler.
    extern "C" fn end(_: libc::c_int) {
        if let Some(c) = CONTROLLER.get() {
            c.notify_shutdown();
        }
    }
    CONTROLLER.get_or_init(|| controller.clone());
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the structure is valid (all zeros: no flags, empty mask) and lives
        // through the call; the handler is safe at any time.
        let set = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = end as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal, &action, std::ptr::null_mut())
        };
        if set != 0 {
            return Err(format!("handle signal {signal}: {}", io::Error::last_os_error()));
        }
    }
    Ok(())
}
