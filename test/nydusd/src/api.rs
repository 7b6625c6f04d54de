//! What the API's requests do. nydus-api turns HTTP into them and the answers
//! into HTTP; the libraries do the work.

use std::str::FromStr;
use std::sync::Arc;

use log::{info, LevelFilter};
use nydus_api::{
    ApiError, ApiMountCmd, ApiRequest, ApiResponse, ApiResponsePayload as Payload, DaemonConf, DaemonErrorKind,
    MetricsError, MetricsErrorKind,
};
use nydus_service::daemon::NydusDaemon;
use nydus_service::upgrade::UpgradeMgrError;
use nydus_service::{Error, FsBackendMountCmd, FsBackendType, FsBackendUmountCmd, FsService};
use nydus_utils::metrics;

pub struct Api {
    // Not asked of the controller each time: that panics once it has begun to
    // shut down, and a request may come then.
    daemon: Arc<dyn NydusDaemon>,
}

impl Api {
    pub fn new(daemon: Arc<dyn NydusDaemon>) -> Self {
        Api { daemon }
    }

    pub fn handle(&self, request: ApiRequest) -> ApiResponse {
        use ApiRequest::*;
        let daemon = &self.daemon;
        match request {
            GetDaemonInfo => daemon.export_info(true).map(Payload::DaemonInfo).map_err(refused),
            GetDaemonInfoV2 => daemon.export_info(false).map(Payload::DaemonInfo).map_err(refused),
            ConfigureDaemon(conf) => configure(&conf),
            Start => done("start", daemon.trigger_start()),
            Exit => self.exit(),
            SendFuseFd => done("send FUSE descriptor", self.save()),
            TakeoverFuseFd => done("take over", daemon.trigger_takeover()),

            Mount(at, cmd) => self.change_mounts(|fs| fs.mount(mount_command(at, cmd)?)),
            Remount(at, cmd) => self.change_mounts(|fs| fs.remount(mount_command(at, cmd)?)),
            Umount(mountpoint) => self.change_mounts(|fs| fs.umount(FsBackendUmountCmd { mountpoint })),

            GetEvents => metrics::export_events().map(Payload::Events).map_err(|e| ApiError::Events(format!("{e:?}"))),
            ExportFsGlobalMetrics(id) => counted(metrics::export_global_stats(&id), Payload::FsGlobalMetrics),
            ExportFsFilesMetrics(id, latest) => {
                counted(metrics::export_files_stats(&id, latest), Payload::FsFilesMetrics)
            }
            ExportFsAccessPatterns(id) => counted(metrics::export_files_access_pattern(&id), Payload::FsFilesPatterns),
            ExportBackendMetrics(id) => counted(metrics::export_backend_metrics(&id), Payload::BackendMetrics),
            ExportBlobcacheMetrics(id) => counted(metrics::export_blobcache_metrics(&id), Payload::BlobcacheMetrics),
            ExportFsBackendInfo(at) => self
                .fs()
                .and_then(|fs| fs.export_backend_info(&at))
                .map(Payload::FsBackendInfo)
                .map_err(|e| ApiError::Metrics(MetricsErrorKind::Daemon(e.into()))),
            ExportFsInflightMetrics => self
                .fs()
                .and_then(|fs| fs.export_inflight_ops())
                .map(|ops| ops.map_or(Payload::Empty, Payload::FsInflightMetrics))
                .map_err(|e| ApiError::Metrics(MetricsErrorKind::Daemon(e.into()))),

            // Only a daemon for fscache manages blobs. (Upstream's aborts at the first one.)
            GetBlobObject(_) | CreateBlobObject(_) | DeleteBlobObject(_) | DeleteBlobFile(_) => {
                Err(refused(Error::Unsupported))
            }
        }
    }

    fn fs(&self) -> Result<Arc<dyn FsService>, Error> {
        self.daemon.get_default_fs_service().ok_or(Error::NotFound)
    }

    fn save(&self) -> Result<(), Error> {
        // Without one the library panics.
        self.daemon.supervisor().ok_or(UpgradeMgrError::MissingSupervisorPath)?;
        self.daemon.save()
    }

    fn change_mounts(&self, change: impl FnOnce(&dyn FsService) -> Result<(), Error>) -> ApiResponse {
        match self.fs().and_then(|fs| change(fs.as_ref())) {
            Ok(()) => Ok(Payload::Empty),
            Err(e) => Err(ApiError::MountFilesystem(e.into())),
        }
    }

    /// Stops serving and keeps the mount. The program ends once this is
    /// answered; until then no thread may be left that reads from the kernel, or
    /// it would take requests from a successor.
    fn exit(&self) -> ApiResponse {
        done("exit", self.daemon.trigger_exit().and_then(|()| self.daemon.wait_service()))
    }
}

fn done(what: &str, result: Result<(), Error>) -> ApiResponse {
    match result {
        Ok(()) => {
            info!("API: {what}: done");
            Ok(Payload::Empty)
        }
        Err(e) => {
            log::error!("API: {what}: {e}");
            Err(refused(e))
        }
    }
}

fn refused(e: Error) -> ApiError {
    ApiError::DaemonAbnormal(e.into())
}

fn counted(result: Result<String, MetricsError>, payload: fn(String) -> Payload) -> ApiResponse {
    result.map(payload).map_err(|e| ApiError::Metrics(MetricsErrorKind::Stats(e)))
}

fn mount_command(mountpoint: String, cmd: ApiMountCmd) -> Result<FsBackendMountCmd, Error> {
    Ok(FsBackendMountCmd {
        fs_type: FsBackendType::from_str(&cmd.fs_type)?,
        source: cmd.source,
        config: cmd.config,
        mountpoint,
        prefetch_files: cmd.prefetch_files,
    })
}

fn configure(conf: &DaemonConf) -> ApiResponse {
    let level = LevelFilter::from_str(&conf.log_level)
        .map_err(|_| ApiError::DaemonAbnormal(DaemonErrorKind::Other(format!("no log level: {}", conf.log_level))))?;
    log::set_max_level(level);
    Ok(Payload::Empty)
}
