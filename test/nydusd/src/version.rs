//! What this program says about itself.

use nydus_api::BuildTimeInfo;

/// Stands where upstream names its commit, and tells the two apart.
macro_rules! source {
    () => {
        "nydus-service 0.4.0 from crates.io, not upstream's front end"
    };
}

/// For `nydusd --version`, in upstream's form: programs read "Version: v…".
pub const TEXT: &str = concat!("Version: \tv", env!("CARGO_PKG_VERSION"), "\nGit Commit: \t", source!());

/// For GET /api/v1/daemon.
pub fn info() -> BuildTimeInfo {
    BuildTimeInfo {
        package_ver: concat!("v", env!("CARGO_PKG_VERSION")).into(),
        git_commit: source!().into(),
        build_time: String::new(),
        profile: if cfg!(debug_assertions) { "debug" } else { "release" }.into(),
        rustc: String::new(),
    }
}
