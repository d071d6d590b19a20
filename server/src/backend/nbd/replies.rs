//! What the bytes that a server sends in the transmission phase mean: a state machine without a socket.
//!
//! It is given bytes as they come, cut anywhere, and says what they are. Every length, offset and cookie is held against
//! what was asked before anybody acts on it. Data may go another way: [`Replies::data`] says what comes next, and
//! [`Replies::skip`] takes note that it has come.

use super::wire::{CHUNK_DONE, CHUNK_LEN, CHUNK_MAGIC, ESHUTDOWN, SIMPLE_REPLY_LEN, SIMPLE_REPLY_MAGIC, chunk};

/// Bytes of a chunk of an error, at most: a message has 4096.
const MAX_ERROR_LEN: u32 = 4096 + 16;

/// What a request without an answer has asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// So many bytes of the export from there on.
    Read {
        /// First byte of the export.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Something that is answered without data.
    Other,
}

/// The requests without an answer.
pub trait Outstanding {
    /// What the request with this cookie has asked for; `None` if there is none.
    fn asked(&self, cookie: u64) -> Option<Asked>;
}

/// What was said of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Data of a read, perhaps not all: it belongs `at` bytes after the first that was asked for, and ends within.
    Data {
        /// Whose.
        cookie: u64,
        /// Bytes from the start of what was asked for.
        at: u32,
        /// The data.
        bytes: &'a [u8],
    },
    /// Zeroes of a read, in place of data.
    Zeroes {
        /// Whose.
        cookie: u64,
        /// Bytes from the start of what was asked for.
        at: u32,
        /// Bytes, to end within what was asked for.
        len: u32,
    },
    /// It has failed; the end comes later.
    Error {
        /// Whose.
        cookie: u64,
        /// The protocol's number (`NBD_E*`), not 0.
        error: u32,
    },
    /// The answer is complete.
    End {
        /// Whose.
        cookie: u64,
    },
}

/// How a server has broken the protocol: nothing that it says can be relied on any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Neither kind of reply begins like that.
    #[error("a reply begins with {0:#x}, which no reply does")]
    Magic(u32),
    /// A structured reply that was not agreed upon.
    #[error("a structured reply, which was not agreed upon")]
    Structured,
    /// A simple reply to a read although structured ones were agreed upon.
    #[error("a simple reply to a read, although structured ones were agreed upon")]
    Simple,
    /// Nobody has asked that.
    #[error("a reply to a request that there is not (cookie {0:#x})")]
    Cookie(u64),
    /// A chunk that does not answer what was asked.
    #[error("a chunk of type {kind} in the reply to a request that it does not answer")]
    Chunk {
        /// `NBD_REPLY_TYPE_*`.
        kind: u16,
    },
    /// A chunk whose length its type does not have.
    #[error("a chunk of type {kind} has {len} bytes")]
    Length {
        /// `NBD_REPLY_TYPE_*`.
        kind: u16,
        /// Bytes.
        len: u32,
    },
    /// Data that nobody has asked for.
    #[error("data from byte {offset} on, {len} bytes, which was not asked for")]
    Range {
        /// First byte of the export.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// An error that is none.
    #[error("an error chunk without an error")]
    NoError,
    /// Not all that was asked for, or some of it twice.
    #[error("{got} bytes of data in the reply to a read of {asked}")]
    Incomplete {
        /// Bytes.
        asked: u32,
        /// Bytes.
        got: u64,
    },
    /// The server says that it goes.
    #[error("the server is shutting down")]
    ShuttingDown,
}

/// A chunk whose header has been read.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    kind: u16,
    last: bool,
    cookie: u64,
    /// Bytes after the header.
    len: u32,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// The next bytes begin a reply or a chunk.
    Header,
    /// The next bytes are what a chunk of this type begins with.
    Body(Chunk),
    /// The next bytes are data.
    Data { cookie: u64, at: u32, left: u32, last: bool },
    /// The next bytes are an error's message.
    Message { cookie: u64, left: u32, last: bool },
    /// All has been said of a request but that it is over.
    End { cookie: u64 },
}

/// The state machine.
#[derive(Debug)]
pub struct Replies {
    structured: bool,
    state: State,
    /// What has come of a header or a body, which are read as a whole.
    gathered: [u8; CHUNK_LEN],
    filled: usize,
}

impl Replies {
    /// A connection's first reply is to come; whether structured replies were agreed upon.
    pub fn new(structured: bool) -> Self {
        Self { structured, state: State::Header, gathered: [0; CHUNK_LEN], filled: 0 }
    }

    /// Whether no reply has begun.
    pub fn is_between_replies(&self) -> bool {
        matches!(self.state, State::Header) && self.filled == 0
    }

    /// The data that the next bytes are: whose, bytes from the start of what was asked for, bytes.
    pub fn data(&self) -> Option<(u64, u32, u32)> {
        match self.state {
            State::Data { cookie, at, left, .. } => Some((cookie, at, left)),
            _ => None,
        }
    }

    /// The first `bytes` bytes of [`data`](Self::data) have gone where they belong.
    pub fn skip(&mut self, bytes: u32) {
        if let State::Data { cookie, at, left, last } = self.state {
            self.state = match left.saturating_sub(bytes) {
                0 => Self::after(cookie, last),
                left => State::Data { cookie, at: at.saturating_add(bytes), left, last },
            };
        }
    }

    /// Takes bytes off `input` up to the next event; `None` when all are taken and there is no event left.
    ///
    /// # Errors
    /// How the server breaks the protocol; nothing more is to be asked then.
    pub fn next<'a>(
        &mut self,
        input: &mut &'a [u8],
        outstanding: &impl Outstanding,
    ) -> Result<Option<Event<'a>>, Violation> {
        loop {
            match self.state {
                State::End { cookie } => {
                    self.state = State::Header;
                    return Ok(Some(Event::End { cookie }));
                }
                State::Data { cookie, at, left, .. } => {
                    let bytes = take(input, left as usize);
                    if bytes.is_empty() {
                        return Ok(None);
                    }
                    self.skip(bytes.len() as u32);
                    return Ok(Some(Event::Data { cookie, at, bytes }));
                }
                State::Message { cookie, left, last } => {
                    let left = left.saturating_sub(take(input, left as usize).len() as u32);
                    self.state =
                        if left == 0 { Self::after(cookie, last) } else { State::Message { cookie, left, last } };
                    if left > 0 {
                        return Ok(None);
                    }
                }
                State::Header => {
                    let Some(event) = self.header(input, outstanding)? else { return Ok(None) };
                    if let Some(event) = event {
                        return Ok(Some(event));
                    }
                }
                State::Body(chunk) => {
                    let Some(event) = self.body(chunk, input, outstanding)? else { return Ok(None) };
                    if let Some(event) = event {
                        return Ok(Some(event));
                    }
                }
            }
        }
    }

    /// What comes after a chunk.
    fn after(cookie: u64, last: bool) -> State {
        if last { State::End { cookie } } else { State::Header }
    }

    /// Gathers `len` bytes, which are at most [`CHUNK_LEN`]; whether all are there.
    fn gather(&mut self, input: &mut &[u8], len: usize) -> bool {
        let bytes = take(input, len.saturating_sub(self.filled));
        let end = self.filled.saturating_add(bytes.len());
        if let Some(place) = self.gathered.get_mut(self.filled..end) {
            place.copy_from_slice(bytes);
        }
        self.filled = end;
        end >= len
    }

    fn number<const N: usize>(&self, at: usize) -> [u8; N] {
        self.gathered.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }

    fn u32_at(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.number(at))
    }

    fn u64_at(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.number(at))
    }

    /// Reads what a reply or a chunk begins with: `None` if it is not all there, `Some(None)` if it is no event by itself.
    fn header<'a>(
        &mut self,
        input: &mut &[u8],
        outstanding: &impl Outstanding,
    ) -> Result<Option<Option<Event<'a>>>, Violation> {
        if !self.gather(input, 4) {
            return Ok(None);
        }
        match self.u32_at(0) {
            SIMPLE_REPLY_MAGIC => {
                if !self.gather(input, SIMPLE_REPLY_LEN) {
                    return Ok(None);
                }
                self.filled = 0;
                self.simple(self.u32_at(4), self.u64_at(8), outstanding).map(Some)
            }
            CHUNK_MAGIC if !self.structured => Err(Violation::Structured),
            CHUNK_MAGIC => {
                if !self.gather(input, CHUNK_LEN) {
                    return Ok(None);
                }
                self.filled = 0;
                let (flags, kind) = (u16::from_be_bytes(self.number(4)), u16::from_be_bytes(self.number(6)));
                let last = flags & CHUNK_DONE != 0;
                let chunk = Chunk { kind, last, cookie: self.u64_at(8), len: self.u32_at(16) };
                self.chunk(chunk, outstanding)?;
                Ok(Some(None))
            }
            magic => Err(Violation::Magic(magic)),
        }
    }

    fn simple<'a>(
        &mut self,
        error: u32,
        cookie: u64,
        outstanding: &impl Outstanding,
    ) -> Result<Option<Event<'a>>, Violation> {
        let asked = outstanding.asked(cookie).ok_or(Violation::Cookie(cookie))?;
        if error == ESHUTDOWN {
            return Err(Violation::ShuttingDown);
        }
        self.state = State::End { cookie };
        match asked {
            _ if error != 0 => Ok(Some(Event::Error { cookie, error })),
            Asked::Read { .. } if self.structured => Err(Violation::Simple),
            Asked::Read { len, .. } => {
                self.state = State::Data { cookie, at: 0, left: len, last: true };
                Ok(None)
            }
            Asked::Other => Ok(None),
        }
    }

    /// A chunk's header, held against what was asked.
    fn chunk(&mut self, chunk: Chunk, outstanding: &impl Outstanding) -> Result<(), Violation> {
        let Chunk { kind, last, cookie, len } = chunk;
        let asked = outstanding.asked(cookie).ok_or(Violation::Cookie(cookie))?;
        let read = matches!(asked, Asked::Read { .. });
        let good = match kind {
            // By itself it says nothing: it would be sent for nothing but to be last.
            chunk::NONE => len == 0 && last,
            chunk::OFFSET_DATA if read => len > 8,
            chunk::OFFSET_HOLE if read => len == 12,
            chunk::ERRORS.. => (6..=MAX_ERROR_LEN).contains(&len),
            _ => return Err(Violation::Chunk { kind }),
        };
        if !good {
            return Err(Violation::Length { kind, len });
        }
        self.state = if kind == chunk::NONE { State::End { cookie } } else { State::Body(chunk) };
        Ok(())
    }

    /// Reads what follows a chunk's header before its data; as [`header`](Self::header).
    fn body<'a>(
        &mut self,
        chunk: Chunk,
        input: &mut &[u8],
        outstanding: &impl Outstanding,
    ) -> Result<Option<Option<Event<'a>>>, Violation> {
        let Chunk { kind, last, cookie, len } = chunk;
        let fixed = match kind {
            chunk::OFFSET_DATA => 8,
            chunk::OFFSET_HOLE => 12,
            _ => 6,
        };
        if !self.gather(input, fixed) {
            return Ok(None);
        }
        self.filled = 0;
        if kind >= chunk::ERRORS {
            let error = self.u32_at(0);
            let message = u32::from(u16::from_be_bytes(self.number(4)));
            let left = len.saturating_sub(6);
            if message > left {
                return Err(Violation::Length { kind, len });
            }
            self.state = if left == 0 { Self::after(cookie, last) } else { State::Message { cookie, left, last } };
            return match error {
                0 => Err(Violation::NoError),
                ESHUTDOWN => Err(Violation::ShuttingDown),
                error => Ok(Some(Some(Event::Error { cookie, error }))),
            };
        }
        let offset = self.u64_at(0);
        let bytes = if kind == chunk::OFFSET_DATA { len.saturating_sub(8) } else { self.u32_at(8) };
        let Some(Asked::Read { offset: first, len: asked }) = outstanding.asked(cookie) else {
            return Err(Violation::Cookie(cookie));
        };
        let within = offset.checked_sub(first).and_then(|at| u32::try_from(at).ok());
        let within = within.filter(|at| at.checked_add(bytes).is_some_and(|end| bytes > 0 && end <= asked));
        let at = within.ok_or(Violation::Range { offset, len: bytes.into() })?;
        if kind == chunk::OFFSET_DATA {
            self.state = State::Data { cookie, at, left: bytes, last };
            return Ok(Some(None));
        }
        self.state = Self::after(cookie, last);
        Ok(Some(Some(Event::Zeroes { cookie, at, len: bytes })))
    }
}

/// Takes the first `len` bytes off the input, or as many as there are.
fn take<'a>(input: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (taken, rest) = input.split_at(len.min(input.len()));
    *input = rest;
    taken
}

#[cfg(test)]
mod tests;
