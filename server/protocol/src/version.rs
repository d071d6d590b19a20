//! VERSION: the version and the capabilities that both sides agree on.

use nix::errno::Errno;
use serde_json::{Map, Value};

use crate::DEFAULT_MAX_DATA_XFER_SIZE;
use crate::fields::Fields;

/// The payload of VERSION, request and reply (section "VFIO_USER_VERSION").
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Version {
    /// The major version; 0 today.
    pub major: u16,
    /// The minor version.
    pub minor: u16,
    /// What the sender supports.
    pub capabilities: Capabilities,
}

/// What one side supports. `None` is a capability that the message leaves out: the peer then assumes
/// the value that the specification gives, see the methods.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// The most file descriptors that the sender takes with one message.
    pub max_msg_fds: Option<u64>,
    /// The largest `count` of a data transfer message that the sender takes, in bytes.
    pub max_data_xfer_size: Option<u64>,
    /// The most DMA ranges mapped at one time.
    pub max_dma_maps: Option<u64>,
    /// The page sizes of DMA mappings, in bytes, or'ed together.
    pub pgsizes: Option<u64>,
    /// Whether REGION_WRITE_MULTI is supported.
    pub write_multiple: Option<bool>,
    /// What the sender supports of migration.
    pub migration: Option<Migration>,
}

/// The `migration` capability.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Migration {
    /// The page size of dirty tracking, in bytes.
    pub pgsize: Option<u64>,
    /// The largest bitmap in a message, in bytes.
    pub max_bitmap_size: Option<u64>,
}

impl Capabilities {
    /// The value of [`max_msg_fds`](Self#structfield.max_msg_fds) that holds: 1 unless given.
    pub fn max_msg_fds(&self) -> u64 {
        self.max_msg_fds.unwrap_or(1)
    }

    /// The value of [`max_data_xfer_size`](Self#structfield.max_data_xfer_size) that holds: 1 MiB
    /// unless given.
    pub fn max_data_xfer_size(&self) -> u64 {
        self.max_data_xfer_size.unwrap_or(u64::from(DEFAULT_MAX_DATA_XFER_SIZE))
    }

    /// The value of [`max_dma_maps`](Self#structfield.max_dma_maps) that holds: 65535 unless given.
    pub fn max_dma_maps(&self) -> u64 {
        self.max_dma_maps.unwrap_or(65535)
    }

    /// The value of [`pgsizes`](Self#structfield.pgsizes) that holds: 4096 unless given.
    pub fn pgsizes(&self) -> u64 {
        self.pgsizes.unwrap_or(4096)
    }

    fn from_json(object: &Map<String, Value>) -> Result<Capabilities, Errno> {
        let migration = match object.get("migration") {
            None => None,
            Some(Value::Object(migration)) => Some(Migration {
                pgsize: number(migration, "pgsize")?,
                max_bitmap_size: number(migration, "max_bitmap_size")?,
            }),
            Some(_) => return Err(Errno::EINVAL),
        };
        let write_multiple = match object.get("write_multiple") {
            None => None,
            Some(Value::Bool(value)) => Some(*value),
            Some(_) => return Err(Errno::EINVAL),
        };
        Ok(Capabilities {
            max_msg_fds: number(object, "max_msg_fds")?,
            max_data_xfer_size: number(object, "max_data_xfer_size")?,
            max_dma_maps: number(object, "max_dma_maps")?,
            pgsizes: number(object, "pgsizes")?,
            write_multiple,
            migration,
        })
    }

    fn to_json(&self) -> Map<String, Value> {
        let numbers = [
            ("max_msg_fds", self.max_msg_fds),
            ("max_data_xfer_size", self.max_data_xfer_size),
            ("max_dma_maps", self.max_dma_maps),
            ("pgsizes", self.pgsizes),
        ];
        let mut object = to_json_numbers(&numbers);
        if let Some(value) = self.write_multiple {
            object.insert("write_multiple".into(), value.into());
        }
        if let Some(Migration { pgsize, max_bitmap_size }) = self.migration {
            let numbers = [("pgsize", pgsize), ("max_bitmap_size", max_bitmap_size)];
            object.insert("migration".into(), to_json_numbers(&numbers).into());
        }
        object
    }
}

fn number(object: &Map<String, Value>, name: &str) -> Result<Option<u64>, Errno> {
    object.get(name).map(|value| value.as_u64().ok_or(Errno::EINVAL)).transpose()
}

fn to_json_numbers(numbers: &[(&str, Option<u64>)]) -> Map<String, Value> {
    numbers.iter().filter_map(|(name, value)| value.map(|value| ((*name).into(), value.into()))).collect()
}

impl Version {
    /// Appends the payload. Capabilities that are `None` take no room; when all are, no JSON is sent.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.major.to_ne_bytes());
        out.extend_from_slice(&self.minor.to_ne_bytes());
        let capabilities = self.capabilities.to_json();
        if !capabilities.is_empty() {
            let object = Map::from_iter([("capabilities".into(), capabilities.into())]);
            out.extend_from_slice(Value::Object(object).to_string().as_bytes());
            out.push(0);
        }
    }

    /// Reads a payload. Keys that are not known are ignored, and so is what follows the NUL.
    ///
    /// # Errors
    /// EINVAL when the payload is too short, its JSON is not ended by a NUL, is not an object, or
    /// gives a capability a value of another type.
    pub fn decode(payload: &[u8]) -> Result<Version, Errno> {
        let mut fields = Fields::new(payload);
        let (major, minor) = (fields.u16()?, fields.u16()?);
        let data = fields.rest();
        if data.is_empty() {
            return Ok(Version { major, minor, capabilities: Capabilities::default() });
        }
        let end = data.iter().position(|byte| *byte == 0).ok_or(Errno::EINVAL)?;
        let json = data.get(..end).ok_or(Errno::EINVAL)?;
        let object: Map<String, Value> = serde_json::from_slice(json).map_err(|_| Errno::EINVAL)?;
        let capabilities = match object.get("capabilities") {
            None => Capabilities::default(),
            Some(Value::Object(capabilities)) => Capabilities::from_json(capabilities)?,
            Some(_) => return Err(Errno::EINVAL),
        };
        Ok(Version { major, minor, capabilities })
    }
}
