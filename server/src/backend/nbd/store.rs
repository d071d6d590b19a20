//! The store: what all queues of a device share.

use std::io;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};

use super::connection::Connection;
use super::error::{HandshakeError, NbdError};
use super::export::Export;
use super::link::{Dialer, Link};
use super::reconnect::{Attendant, FLUSH_LIMIT, HANDSHAKE_LIMIT, Order, Port, Watch};
use super::socket::Resolved;
use super::tls::{Credentials, Tls};
use super::uri::NbdUri;
use crate::backend::uring::{Uring, Waker};
use crate::backend::{Backend, Service, Store, StoreInfo};

/// What to connect to, and how.
#[derive(Clone, Debug)]
pub struct NbdOptions {
    /// The export.
    pub uri: NbdUri,
    /// Whether to refrain from all changes.
    pub read_only: bool,
    /// Connections, at most; each queue has one of its own.
    pub connections: u16,
    /// How long requests wait for a server that is gone or silent before they fail.
    pub deadline: Duration,
    /// For TLS, which the URI asks for.
    pub credentials: Option<Credentials>,
}

/// An export of an NBD server.
///
/// A flush and a durable write are as durable as the server makes them. A server that says nothing of flushing
/// (`NBD_FLAG_SEND_FLUSH`) is taken to have nothing to flush.
///
/// A connection that is lost is made again, and requests without an answer are sent again. A server that has lost its own
/// memory meanwhile may have lost writes that it had answered and not flushed, and no flush can tell.
#[derive(Debug)]
pub struct NbdStore(Arc<Shared>);

/// What all queues share.
#[derive(Debug)]
pub(super) struct Shared {
    options: NbdOptions,
    dialer: Dialer,
    /// As it was at first, and is to stay.
    export: Export,
    /// Connections that no queue has.
    links: Mutex<Vec<Link>>,
    orders: Sender<Order>,
    /// For the thread, until that has taken it.
    given: Mutex<Option<Receiver<Order>>>,
    watch: Arc<Watch>,
}

impl Shared {
    pub(super) fn uri(&self) -> &NbdUri {
        &self.options.uri
    }

    pub(super) fn deadline(&self) -> Duration {
        self.options.deadline
    }

    pub(super) fn port(&self, waker: &Waker) -> Arc<Port> {
        Port::new(waker, &self.orders, &self.watch)
    }

    /// A connection that no queue has.
    pub(super) fn take_link(&self) -> Option<Link> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    /// A queue has no use for a connection any more.
    pub(super) fn give_back(&self, link: Link) {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        if links.len() < usize::from(self.options.connections) {
            links.push(link);
        }
    }
}

impl NbdStore {
    /// Connects for the first time, which blocks for some seconds at most.
    ///
    /// # Errors
    /// If the export cannot be used.
    pub fn open(options: NbdOptions) -> Result<Self, NbdError> {
        let uri = options.uri.to_string();
        Self::connect(options).map_err(|reason| NbdError { uri, reason: Box::new(reason) })
    }

    fn connect(options: NbdOptions) -> Result<Self, HandshakeError> {
        let NbdUri { address, export, tls, .. } = &options.uri;
        let tls = match (tls, &options.credentials) {
            (false, _) => None,
            (true, Some(credentials)) => Some(Tls::load(credentials, address)?),
            (true, None) => return Err(HandshakeError::NoCredentials),
        };
        let dialer = Dialer { address: Resolved::of(address)?, export: export.clone(), tls };
        let link = dialer.dial(HANDSHAKE_LIMIT)?;
        let export = link.agreement.export;
        let (orders, given) = unbounded();
        let given = Mutex::new(Some(given));
        let (links, watch) = (Mutex::new(vec![link]), Arc::default());
        Ok(Self(Arc::new(Shared { options, dialer, export, links, orders, given, watch })))
    }
}

impl Store for NbdStore {
    fn info(&self) -> StoreInfo {
        self.0.export.info(self.0.options.read_only)
    }

    fn attach(&self, ring: &Rc<Uring>, _: u16) -> io::Result<Box<dyn Backend>> {
        Ok(Box::new(Connection::new(&self.0, ring)?))
    }

    fn flush(&self) -> io::Result<()> {
        if !self.0.watch.is_unflushed() || !self.0.export.features.flush {
            return Ok(());
        }
        // A connection that nobody has used for a while may have broken meanwhile.
        while let Some(mut link) = self.0.take_link() {
            if link.flush(FLUSH_LIMIT).is_ok() {
                self.0.watch.flushed();
                self.0.give_back(link);
                return Ok(());
            }
        }
        let (answer, flushed) = bounded(1);
        let gone = |_| io::Error::new(io::ErrorKind::NotConnected, "no server answers to flush what was written");
        self.0.orders.send(Order::Flush(answer)).map_err(|_| gone(RecvTimeoutError::Disconnected))?;
        flushed.recv_timeout(FLUSH_LIMIT + HANDSHAKE_LIMIT).map_err(gone)??;
        self.0.watch.flushed();
        Ok(())
    }

    /// As many as there may be connections; one where what a connection flushes need not be what another has written.
    fn max_queues(&self) -> u16 {
        if self.0.export.features.multi_conn { self.0.options.connections.max(1) } else { 1 }
    }

    fn service(&self) -> Option<Service> {
        let orders = self.0.given.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        let ports = match &self.0.dialer.address {
            Resolved::Tcp(addresses) => addresses.first().map(std::net::SocketAddr::port).into_iter().collect(),
            Resolved::Unix(_) => Vec::new(),
        };
        let attendant = Attendant {
            uri: self.0.options.uri.clone(),
            dialer: self.0.dialer.clone(),
            export: self.0.export,
            deadline: self.0.options.deadline,
            orders,
            watch: Arc::clone(&self.0.watch),
        };
        Some(Service { ports, run: Box::new(move || attendant.run()) })
    }

    fn resize(&self, _: Option<u64>) -> io::Result<u64> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
