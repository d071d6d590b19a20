//! Blocks of an NBD server, over a socket.
//!
//! A device connects when it is opened; from then on each queue has a connection of its own, which its worker uses by
//! its io_uring: requests go out together, headers of ours and data as it lies in the guest's memory; what a
//! server answers comes in by one receive at a time, which knows from the replies so far whether the next bytes are data, and
//! then goes straight to the guest's memory. Only data that is encrypted is copied.
//!
//! - `uri`, `export`: what the operator names, and what the server says of it.
//! - `handshake`, `link`, `socket`, `tls`: how a connection comes to be, on threads that may wait.
//! - `wire`, `replies`: what goes over it, without a socket.
//! - `request`, `requests`: what operations become, and which of them have no answer yet.
//! - `transfer`, `connection`: the same in the ring.
//! - `reconnect`: the one thread that a store has, for what a worker must not wait for.
//!
//! # Several connections
//! Of a server that does not say `NBD_FLAG_CAN_MULTI_CONN` one connection need not flush, nor even see, what another has
//! written. A device on such a server has one queue, and so one connection, which is handed on from queue to queue
//! when a driver starts anew.
//!
//! # Lost connections
//! Requests without an answer are sent again on the next connection, in their order. Doing one of them twice does what
//! doing it once does. What nobody can rule out is that the server which was lost is still there, and does a write after it was
//! sent again and another one to the same blocks was answered; the protocol has no means against that.

mod connection;
mod error;
mod export;
mod handshake;
mod link;
mod reconnect;
mod replies;
mod request;
mod requests;
mod socket;
mod store;
mod tls;
mod transfer;
mod uri;
mod wire;

pub use error::NbdError;
pub use replies::{Asked, Event, Outstanding, Replies, Violation};
pub use store::{NbdOptions, NbdStore};
pub use tls::Credentials;
pub use uri::{InvalidUri, NbdUri};

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
