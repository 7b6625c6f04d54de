//! The command line, as upstream's nydusd 2.4 has it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use log::LevelFilter;

use crate::version;

#[derive(Parser)]
#[command(name = "nydusd", version = version::TEXT, about = "Serves nydus images")]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

/// What to serve images through. Further ways (virtio-fs, fscache) are further
/// variants here and a module each beside `fuse`; they can share `Common`, the
/// API and the main loop.
#[derive(Subcommand)]
pub enum Command {
    /// Serve one image, or with POST /api/v1/mount several, at a FUSE mountpoint
    Fuse(Fuse),
}

impl Command {
    pub fn common(&self) -> &Common {
        match self {
            Command::Fuse(f) => &f.common,
        }
    }
}

/// Options that do not depend on the way.
#[derive(Args)]
pub struct Common {
    /// Unix socket to listen on for API requests
    #[arg(short = 'A', long, value_name = "PATH")]
    pub apisock: Option<PathBuf>,

    /// Name of this daemon, for GET /api/v1/daemon
    #[arg(long)]
    pub id: Option<String>,

    /// error, warn, info, debug or trace
    #[arg(short = 'l', long, value_name = "LEVEL", default_value = "info")]
    pub log_level: LevelFilter,

    /// File for the log, instead of standard error; ".log" is added to a name without an extension
    #[arg(short = 'L', long, value_name = "PATH")]
    pub log_file: Option<PathBuf>,

    /// Start a new log file at this size, in MiB; 0: never
    #[arg(long, value_name = "MIB", default_value_t = 0)]
    pub log_rotation_size: u64,

    /// Limit of open files; 0 leaves it as it is
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    pub rlimit_nofile: u64,
}

#[derive(Args)]
pub struct Fuse {
    #[command(flatten)]
    pub common: Common,

    /// Directory to mount on
    #[arg(short = 'M', long, value_name = "DIR")]
    pub mountpoint: PathBuf,

    /// The image's metadata. Without it the filesystem starts out empty
    #[arg(short = 'B', long, value_name = "PATH", requires = "config")]
    pub bootstrap: Option<PathBuf>,

    /// Configuration of the image's backend and cache
    #[arg(short = 'C', long, value_name = "PATH", requires = "bootstrap")]
    pub config: Option<PathBuf>,

    /// File with the paths to prefetch, one a line
    #[arg(long, value_name = "PATH", requires = "bootstrap")]
    pub prefetch_files: Option<PathBuf>,

    /// Where within the filesystem the image appears
    #[arg(short = 'm', long, value_name = "PATH", default_value = "/")]
    pub virtual_mountpoint: String,

    /// Number of threads that answer the kernel
    #[arg(short = 't', long, visible_alias = "thread-num", value_name = "N", default_value_t = 4,
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub fuse_threads: u32,

    /// Unix socket that keeps FUSE descriptor and state for a successor
    #[arg(long, value_name = "PATH")]
    pub supervisor: Option<String>,

    /// Mount nothing, and wait to be told to take over from a predecessor
    #[arg(long, requires_all = ["supervisor", "apisock"])]
    pub upgrade: bool,

    /// What a successor does about requests that the predecessor left unanswered
    #[arg(long, value_name = "POLICY", default_value = "resend", value_parser = ["none", "flush", "resend"])]
    pub failover_policy: String,
}
