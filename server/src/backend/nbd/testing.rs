//! A small NBD server, as honest as a test wants.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};

use super::store::{NbdOptions, NbdStore};
use super::wire::{CHUNK_MAGIC, REQUEST_LEN, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC};
use crate::backend::Store;

/// One request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) kind: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    /// What was read or is to be written.
    pub(crate) data: Vec<u8>,
}

/// What becomes of a request: the bytes of the answer, or the end of the connection.
pub(crate) type Answer = fn(&Asked, &Conduct) -> Option<Vec<u8>>;

/// How a server is to be.
#[derive(Clone, Debug)]
pub(crate) struct Conduct {
    pub(crate) size: u64,
    /// `NBD_FLAG_*`.
    pub(crate) flags: u16,
    /// Whether it has structured replies, and TCP, where they are asked for; a UNIX socket otherwise.
    pub(crate) structured: bool,
    pub(crate) block_sizes: Option<[u32; 3]>,
    /// Requests after which a connection ends in the middle of an answer.
    pub(crate) requests: usize,
    pub(crate) answer: Answer,
}

/// Everything, on several connections.
pub(crate) const ALL: u16 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8;

impl Conduct {
    pub(crate) fn honest(size: u64) -> Self {
        Self { size, flags: ALL, structured: true, block_sizes: None, requests: usize::MAX, answer: honest }
    }
}

pub(crate) fn simple(asked: &Asked, error: u32, data: &[u8]) -> Vec<u8> {
    [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &error.to_be_bytes(), &asked.cookie.to_be_bytes(), data].concat()
}

pub(crate) fn chunk(cookie: u64, flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
    let len = payload.len() as u32;
    [
        &CHUNK_MAGIC.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &len.to_be_bytes(),
        payload,
    ]
    .concat()
}

/// Reads by structured replies come in several chunks, the last first, with holes where there are zeroes.
fn honest(asked: &Asked, conduct: &Conduct) -> Option<Vec<u8>> {
    if asked.kind != 0 {
        return Some(simple(asked, 0, &[]));
    }
    if !conduct.structured {
        return Some(simple(asked, 0, &asked.data));
    }
    let mut bytes = Vec::new();
    let piece = (asked.data.len() / 3).next_multiple_of(512);
    for (index, data) in asked.data.chunks(piece).enumerate().rev() {
        let offset = (asked.offset + (index * piece) as u64).to_be_bytes();
        let last = u16::from(index == 0 && asked.cookie.is_multiple_of(2));
        bytes.extend(if data.iter().all(|byte| *byte == 0) {
            chunk(asked.cookie, last, 2, &[&offset[..], &(data.len() as u32).to_be_bytes()].concat())
        } else {
            chunk(asked.cookie, last, 1, &[&offset[..], data].concat())
        });
    }
    if !asked.cookie.is_multiple_of(2) {
        bytes.extend(chunk(asked.cookie, 1, 0, &[]));
    }
    Some(bytes)
}

struct Shared {
    conduct: Mutex<Conduct>,
    file: File,
    stop: AtomicBool,
    connections: AtomicUsize,
    streams: Mutex<Vec<File>>,
}

/// Where it listens.
#[derive(Clone)]
enum Place {
    Unix(PathBuf),
    /// Port 0 until it is known. Not on the address that clients have: one that connects where nobody listens may meet itself.
    Tcp(SocketAddr),
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Place {
    fn listen(&mut self) -> Listener {
        match self {
            Self::Unix(path) => {
                let _old = std::fs::remove_file(&path);
                Listener::Unix(UnixListener::bind(path).unwrap())
            }
            Self::Tcp(address) => {
                let listener = TcpListener::bind(*address).unwrap();
                *address = listener.local_addr().unwrap();
                Listener::Tcp(listener)
            }
        }
    }

    /// Has a listener see that it is to stop.
    fn wake(&self) {
        let _woken = match self {
            Self::Unix(path) => UnixStream::connect(path).map(OwnedFd::from),
            Self::Tcp(address) => TcpStream::connect(address).map(OwnedFd::from),
        };
    }

    fn uri(&self) -> String {
        match self {
            Self::Unix(path) => format!("nbd+unix:///disk?socket={}", path.display()),
            Self::Tcp(address) => format!("nbd://{address}/disk"),
        }
    }
}

impl Listener {
    fn accept(&self) -> File {
        let socket: OwnedFd = match self {
            Self::Unix(listener) => listener.accept().unwrap().0.into(),
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().unwrap();
                stream.set_nodelay(true).unwrap();
                stream.into()
            }
        };
        socket.into()
    }
}

/// The server, until it is dropped.
pub(crate) struct Server {
    shared: Arc<Shared>,
    folder: tempfile::TempDir,
    place: Place,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn new(conduct: Conduct) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = File::options().read(true).write(true).create_new(true).open(folder.path().join("image")).unwrap();
        file.set_len(conduct.size).unwrap();
        let place = if conduct.structured {
            Place::Tcp(SocketAddr::from(([127, 0, 0, 2], 0)))
        } else {
            Place::Unix(folder.path().join("socket"))
        };
        let shared = Arc::new(Shared {
            conduct: Mutex::new(conduct),
            file,
            stop: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
            streams: Mutex::default(),
        });
        let mut server = Self { shared, folder, place, thread: None };
        server.start();
        server
    }

    /// Listens, where it does not.
    pub(crate) fn start(&mut self) {
        let listener = self.place.listen();
        let shared = Arc::clone(&self.shared);
        shared.stop.store(false, Ordering::SeqCst);
        self.thread = Some(thread::spawn(move || {
            loop {
                let stream = listener.accept();
                if shared.stop.load(Ordering::SeqCst) {
                    return;
                }
                shared.streams.lock().unwrap().push(stream.try_clone().unwrap());
                shared.connections.fetch_add(1, Ordering::SeqCst);
                let shared = Arc::clone(&shared);
                thread::spawn(move || serve(&shared, stream));
            }
        }));
    }

    /// Ends all connections, and takes no more.
    pub(crate) fn stop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.shared.stop.store(true, Ordering::SeqCst);
        self.place.wake();
        thread.join().unwrap();
        self.hang_up();
    }

    /// Ends all connections.
    pub(crate) fn hang_up(&self) {
        for stream in self.shared.streams.lock().unwrap().drain(..) {
            hang_up(&stream);
        }
    }

    pub(crate) fn conduct(&self, change: impl FnOnce(&mut Conduct)) {
        change(&mut self.shared.conduct.lock().unwrap());
    }

    /// Connections that there were.
    pub(crate) fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// What it keeps.
    pub(crate) fn stored(&self) -> Vec<u8> {
        std::fs::read(self.folder.path().join("image")).unwrap()
    }

    pub(crate) fn options(&self) -> NbdOptions {
        NbdOptions {
            uri: self.place.uri().parse().unwrap(),
            read_only: false,
            connections: 8,
            deadline: Duration::from_secs(60),
            credentials: None,
        }
    }

    /// A store with the thread that it needs.
    pub(crate) fn store(&self) -> NbdStore {
        self.store_with(|_| {})
    }

    pub(crate) fn store_with(&self, change: impl FnOnce(&mut NbdOptions)) -> NbdStore {
        let mut options = self.options();
        change(&mut options);
        let store = NbdStore::open(options).unwrap();
        thread::spawn(store.service().unwrap().run);
        store
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Ends a connection, if it has not ended.
fn hang_up(stream: &File) {
    let _gone = shutdown(stream.as_raw_fd(), Shutdown::Both);
}

fn take<const N: usize>(stream: &mut File) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).ok()?;
    Some(bytes)
}

fn data(stream: &mut File, len: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).ok()?;
    Some(bytes)
}

/// Serves a connection until it ends.
fn serve(shared: &Shared, mut stream: File) -> Option<()> {
    let conduct = shared.conduct.lock().unwrap().clone();
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03").ok()?;
    let _flags: [u8; 4] = take(&mut stream)?;
    loop {
        let header: [u8; 16] = take(&mut stream)?;
        let [option, len] = [8, 12].map(|at| u32::from_be_bytes(header[at..at + 4].try_into().unwrap()));
        data(&mut stream, len as usize)?;
        let mut says = |kind: u32, data: &[u8]| {
            let numbers = [option, kind, data.len() as u32].map(u32::to_be_bytes).concat();
            stream.write_all(&[&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], &numbers, data].concat()).ok()
        };
        match option {
            7 => {
                says(3, &[&[0, 0][..], &conduct.size.to_be_bytes(), &conduct.flags.to_be_bytes()].concat())?;
                if let Some(sizes) = conduct.block_sizes {
                    says(3, &[&[0, 3][..], &sizes.map(u32::to_be_bytes).concat()].concat())?;
                }
                says(1, &[])?;
                break;
            }
            8 if conduct.structured => says(1, &[])?,
            _ => says(1 << 31 | 1, &[])?,
        }
    }
    let mut left = conduct.requests;
    loop {
        let header: [u8; REQUEST_LEN] = take(&mut stream)?;
        assert_eq!(header[..4], REQUEST_MAGIC.to_be_bytes());
        let number = |at: usize| u64::from_be_bytes(header[at..at + 8].try_into().unwrap());
        let kind = u16::from_be_bytes([header[6], header[7]]);
        let len = u32::from_be_bytes(header[24..].try_into().unwrap());
        let mut asked = Asked { kind, cookie: number(8), offset: number(16), data: Vec::new() };
        let most = conduct.block_sizes.map_or(32 << 20, |sizes| sizes[2]);
        assert!(kind > 1 || len <= most, "{len} bytes at once");
        assert!(asked.offset + u64::from(len) <= conduct.size);
        match kind {
            0 => {
                asked.data = vec![0; len as usize];
                shared.file.read_exact_at(&mut asked.data, asked.offset).unwrap();
            }
            1 => {
                asked.data = data(&mut stream, len as usize)?;
                shared.file.write_all_at(&asked.data, asked.offset).unwrap();
            }
            6 => shared.file.write_all_at(&vec![0; len as usize], asked.offset).unwrap(),
            _ => {}
        }
        let answer = (conduct.answer)(&asked, &conduct)?;
        left -= 1;
        if left == 0 {
            // In the middle of it.
            let _gone = stream.write_all(&answer[..answer.len() / 2]);
            hang_up(&stream);
            return None;
        }
        stream.write_all(&answer).ok()?;
    }
}
