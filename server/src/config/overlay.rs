//! A device that starts as a copy of something that it never changes.

use std::path::Path;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::Size;
use super::device::{DeviceConfig, StoreKind};

/// Where an overlay has its changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OverlayKind {
    /// In memory, gone with the server
    Memory,
    /// In a sparse file without a name, gone with the server
    Temporary,
    /// In a sparse file, found again when the server is started again
    Kept,
}

/// Why an overlay cannot be as it is described. The names are those of the configuration file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidOverlay {
    /// Two bases.
    #[error("overlay_of names an image by itself; leave {0} out, or say overlay in place of overlay_of")]
    TwoBases(&'static str),
    /// A base that cannot be shared.
    #[error("overlay needs something to lie over; name an image by overlay_of, or an export by nbd_uri")]
    NoBase,
    /// No place for its file.
    #[error("overlay = \"kept\" needs overlay_file, the file to keep changes in, which is made if there is none")]
    NoFile,
    /// No place for its file.
    #[error("overlay = \"temporary\" needs overlay_file, the folder to have its file in")]
    NoFolder,
    /// A file for what has none.
    #[error("overlay_file is for overlay = \"kept\" or \"temporary\"; leave it out")]
    FileUnused,
    /// A limit for what there is not.
    #[error("overlay_limit is for overlays; add overlay_of, or leave it out")]
    LimitUnused,
    /// No room for anything.
    #[error("overlay_limit is {0}; it must be 4K or more")]
    Limit(Size),
    /// A cache for memory.
    #[error("cache is for the file of an overlay, and overlay = \"memory\" has none; leave it out")]
    CacheUnused,
    /// Nothing to keep changes of.
    #[error("read_only leaves an overlay nothing to do; leave one of them out")]
    ReadOnly,
    /// Options of the store that go past the page cache.
    #[error("{0} is not for overlays; leave it out")]
    DirectOnly(&'static str),
}

impl DeviceConfig {
    /// Where its changes go, if not into the store.
    pub fn overlay(&self) -> Option<OverlayKind> {
        let kept = self.overlay_file.as_ref().map(|_| OverlayKind::Kept);
        self.overlay.or(kept).or(self.overlay_of.as_ref().map(|_| OverlayKind::Memory))
    }

    /// The file that the store, or an overlay's base, is. What format it has, `store` says.
    pub fn image(&self) -> Option<&Path> {
        self.overlay_of.as_deref().or(self.blk_file.as_deref())
    }

    /// Checks what is said of an overlay.
    pub(super) fn check_overlay(&self) -> Result<(), InvalidOverlay> {
        let Some(kind) = self.overlay() else {
            return if self.overlay_limit.is_some() { Err(InvalidOverlay::LimitUnused) } else { Ok(()) };
        };
        let refusals = [
            (self.overlay_of.is_some() && self.blk_file.is_some(), InvalidOverlay::TwoBases("blk_file")),
            (self.overlay_of.is_some() && self.nbd_uri.is_some(), InvalidOverlay::TwoBases("nbd_uri")),
            (self.overlay_of.is_some() && !self.store_kind().has_file(), InvalidOverlay::TwoBases("store")),
            (matches!(self.store_kind(), StoreKind::Memory | StoreKind::Null), InvalidOverlay::NoBase),
            (kind == OverlayKind::Kept && self.overlay_file.is_none(), InvalidOverlay::NoFile),
            (kind == OverlayKind::Temporary && self.overlay_file.is_none(), InvalidOverlay::NoFolder),
            (kind == OverlayKind::Memory && self.overlay_file.is_some(), InvalidOverlay::FileUnused),
            (kind == OverlayKind::Memory && self.cache.is_some(), InvalidOverlay::CacheUnused),
            (self.read_only, InvalidOverlay::ReadOnly),
            (self.fixed_buffers, InvalidOverlay::DirectOnly("fixed_buffers")),
            (self.iopoll, InvalidOverlay::DirectOnly("iopoll")),
        ];
        if let Some((_, refusal)) = refusals.into_iter().find(|(refused, _)| *refused) {
            return Err(refusal);
        }
        match self.overlay_limit {
            Some(limit) if limit.0 < 4096 => Err(InvalidOverlay::Limit(limit)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Cache;

    fn check(change: impl FnOnce(&mut DeviceConfig)) -> Result<(), InvalidOverlay> {
        let mut device = DeviceConfig::new("blk.sock");
        device.overlay_of = Some("golden".into());
        change(&mut device);
        device.check_overlay()
    }

    #[test]
    fn what_is_not_said_follows_from_the_rest() {
        let kind = |toml: &str| {
            let device: DeviceConfig = toml::from_str(&format!("socket_path = \"a\"\n{toml}")).unwrap();
            assert_eq!(device.check(), Ok(()), "{toml}");
            (device.overlay(), device.image().map(|path| path.to_str().unwrap().to_owned()))
        };
        assert_eq!(kind(""), (None, None));
        assert_eq!(kind("blk_file = 'a'"), (None, Some("a".to_owned())));
        assert_eq!(kind("overlay_of = 'a'"), (Some(OverlayKind::Memory), Some("a".to_owned())));
        assert_eq!(kind("overlay_of = 'a'\noverlay_file = 'b'"), (Some(OverlayKind::Kept), Some("a".to_owned())));
        assert_eq!(kind("overlay = 'memory'\nblk_file = 'a'"), (Some(OverlayKind::Memory), Some("a".to_owned())));
        assert_eq!(kind("overlay_of = 'a'\nstore = 'qcow2'"), (Some(OverlayKind::Memory), Some("a".to_owned())));
        let export = "overlay = 'kept'\nnbd_uri = 'nbd://a/b'\noverlay_file = 'c'\ncache = 'none'\nsize = '1G'";
        assert_eq!(kind(export), (Some(OverlayKind::Kept), None));
        let temporary = "overlay = 'temporary'\nblk_file = 'a'\nstore = 'file'\noverlay_file = '/tmp'\ncache = 'none'";
        assert_eq!(kind(temporary), (Some(OverlayKind::Temporary), Some("a".to_owned())));
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        assert_eq!(check(|device| device.overlay_limit = Some(Size(4096))), Ok(()));
        type Refusal = (fn(&mut DeviceConfig), InvalidOverlay);
        let refusals: [Refusal; 13] = [
            (|device| device.blk_file = Some("a".into()), InvalidOverlay::TwoBases("blk_file")),
            (|device| device.store = Some(StoreKind::Null), InvalidOverlay::TwoBases("store")),
            (|device| device.nbd_uri = Some("nbd://a/".parse().unwrap()), InvalidOverlay::TwoBases("nbd_uri")),
            (|device| device.overlay = Some(OverlayKind::Kept), InvalidOverlay::NoFile),
            (|device| device.overlay = Some(OverlayKind::Temporary), InvalidOverlay::NoFolder),
            (|device| device.cache = Some(Cache::None), InvalidOverlay::CacheUnused),
            (|device| device.read_only = true, InvalidOverlay::ReadOnly),
            (|device| device.fixed_buffers = true, InvalidOverlay::DirectOnly("fixed_buffers")),
            (|device| device.iopoll = true, InvalidOverlay::DirectOnly("iopoll")),
            (|device| device.overlay_limit = Some(Size(4095)), InvalidOverlay::Limit(Size(4095))),
            (|device| (device.overlay, device.overlay_of) = (Some(OverlayKind::Memory), None), InvalidOverlay::NoBase),
            (
                |device| {
                    device.overlay = Some(OverlayKind::Memory);
                    device.overlay_file = Some("b".into());
                },
                InvalidOverlay::FileUnused,
            ),
            (
                |device| (device.overlay_limit, device.overlay_of) = (Some(Size(4096)), None),
                InvalidOverlay::LimitUnused,
            ),
        ];
        for (change, refusal) in refusals {
            assert_eq!(check(change), Err(refusal));
        }
    }
}
