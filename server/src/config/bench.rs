//! The words of `bench`.

use std::path::PathBuf;

use clap::ValueEnum;

use super::Size;

/// What to run against a served disk. The disk's contents are overwritten by writes.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchArgs {
    /// UNIX socket of a vfio-user virtio-blk server
    #[arg(long, value_name = "PATH")]
    pub socket_path: PathBuf,

    /// Pattern of requests
    #[arg(long, value_enum, default_value_t = Workload::Randread)]
    pub rw: Workload,

    /// Bytes of a request, a multiple of the disk's block size
    #[arg(long, value_name = "SIZE", default_value = "4k")]
    pub bs: Size,

    /// Requests in flight on each queue
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=512))]
    pub depth: u16,

    /// Queues, each driven by a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: u16,

    /// How long to run
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub seconds: u32,

    /// Use only the first SIZE bytes of the disk [default: all of it]
    #[arg(long)]
    pub size: Option<Size>,

    /// How the driver learns of completions
    #[arg(long, value_enum, default_value_t = CompletionMode::Poll)]
    pub completion: CompletionMode,

    /// How the driver kicks
    #[arg(long, value_enum, default_value_t = Kick::Message)]
    pub kick: Kick,

    /// Check everything that is read against what this run has written
    #[arg(long)]
    pub verify: bool,

    /// Entries of each queue, a power of two; a request takes one, or three without indirect descriptors
    /// [default: the smallest that holds the depth, 16 at least]
    #[arg(long, value_name = "N")]
    pub queue_size: Option<u16>,

    /// Do not use VIRTIO_F_EVENT_IDX
    #[arg(long)]
    pub no_event_idx: bool,

    /// Do not use VIRTIO_F_INDIRECT_DESC
    #[arg(long)]
    pub no_indirect: bool,

    /// Packed virtqueues, which the disk must offer if they are on [default: on if it offers them]
    #[arg(long, value_enum)]
    pub packed: Option<Switch>,

    /// Completion in order, which the disk must offer if it is on [default: on if it offers that]
    #[arg(long, value_enum)]
    pub in_order: Option<Switch>,

    /// Processor to which the first queue's thread is bound, the next queues' following it [default: none]
    #[arg(long, value_name = "N")]
    pub cpu: Option<usize>,

    /// Print one JSON object in place of the table
    #[arg(long)]
    pub json: bool,
}

/// What is used or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Used
    On,
    /// Not used
    Off,
}

/// A pattern of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// Reads, one after the other
    Read,
    /// Writes, one after the other
    Write,
    /// Reads anywhere
    Randread,
    /// Writes anywhere
    Randwrite,
    /// Reads and writes anywhere, half of each
    Randrw,
}

/// How a driver learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CompletionMode {
    /// It looks at the used ring all the time
    Poll,
    /// It sleeps until it is interrupted
    Event,
}

/// How a driver kicks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kick {
    /// By a REGION_WRITE message that asks for no reply, as QEMU does
    Message,
    /// By an eventfd that the server hands out (GET_REGION_IO_FDS)
    Ioeventfd,
    /// By a write to the doorbell page, which the server must offer to be mapped
    Mapped,
}
