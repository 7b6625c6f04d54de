//! `nydusd fuse`.

use std::fs;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use nydus_api::ConfigV2;
use nydus_service::daemon::{DaemonController, NydusDaemon};
use nydus_service::upgrade::FailoverPolicy;
use nydus_service::{create_fuse_daemon, create_vfs_backend, FsBackendMountCmd, FsBackendType};

use crate::{cli, logging, version};

/// Mounts and serves; with --upgrade, and over what a dead predecessor left
/// behind, only gets ready for PUT /api/v1/daemon/fuse/takeover.
pub fn start(args: &cli::Fuse, controller: &DaemonController) -> Result<Arc<dyn NydusDaemon>, String> {
    let image = image(args)?;
    let mountpoint = args.mountpoint.to_str().ok_or("the mountpoint is not UTF-8")?;
    let policy = FailoverPolicy::try_from(&args.failover_policy).map_err(|e| e.to_string())?;
    let vfs = create_vfs_backend(FsBackendType::Rafs, true, false).map_err(|e| format!("create filesystem: {e}"))?;
    create_fuse_daemon(
        mountpoint,
        vfs,
        args.supervisor.clone(),
        args.common.id.clone(),
        args.fuse_threads,
        // Woken when the kernel lets go of the filesystem.
        controller.alloc_waker(),
        args.common.apisock.as_ref(),
        args.upgrade,
        true,
        policy,
        image,
        version::info(),
    )
    .map_err(|e| match e.to_string() {
        // Many errors come without a text; what happened is in the log alone.
        text if text.is_empty() => format!("serve {mountpoint}: {}", logging::last_error()),
        text => format!("serve {mountpoint}: {text}"),
    })
}

/// The image of the command line, in the form in which API requests name one.
fn image(args: &cli::Fuse) -> Result<Option<FsBackendMountCmd>, String> {
    // clap has seen to it that there are both or neither.
    let (Some(config), Some(bootstrap)) = (&args.config, &args.bootstrap) else {
        return Ok(None);
    };
    let source = bootstrap.to_str().ok_or("the bootstrap's path is not UTF-8")?.to_owned();
    let prefetch_files = args.prefetch_files.as_deref().map(|list| {
        Ok::<_, String>(read(list)?.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect())
    });
    Ok(Some(FsBackendMountCmd {
        fs_type: FsBackendType::Rafs,
        source,
        config: configuration(config)?,
        mountpoint: args.virtual_mountpoint.clone(),
        prefetch_files: prefetch_files.transpose()?,
    }))
}

/// Reads the configuration, which may lack the registry's credentials: they can
/// be in the environment instead.
fn configuration(path: &Path) -> Result<String, String> {
    let text = read(path)?;
    let mut config = ConfigV2::from_str(&text).map_err(|e| format!("configuration {}: {e}", path.display()))?;
    match std::env::var("IMAGE_PULL_AUTH") {
        Ok(auth) if !auth.is_empty() => {
            config.update_registry_auth_info(&Some(auth));
            serde_json::to_string(&config).map_err(|e| format!("configuration {}: {e}", path.display()))
        }
        _ => Ok(text),
    }
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("read {}: {e}", path.display()))
}
