//! The header that opens each message.

use nix::errno::Errno;

use crate::Command;

const TYPE_MASK: u32 = 0xf;
const TYPE_COMMAND: u32 = 0;
const TYPE_REPLY: u32 = 1;
const NO_REPLY: u32 = 0x10;
const ERROR: u32 = 0x20;

/// The header of a message (section "Header"), as it came or as it will go: every value can be held,
/// the methods judge it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Chosen by the sender of a command and echoed in the reply.
    pub id: u16,
    /// What to do: the number of a [`Command`], or any other number from a broken peer.
    pub command: u16,
    /// The size of the whole message, this header included.
    pub size: u32,
    /// Message type (bits 0 to 3), no-reply (bit 4) and error (bit 5).
    pub flags: u32,
    /// In an error reply, the errno; may be 0 even there.
    pub errno: u32,
}

/// What a message is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageType {
    /// Asks for something.
    Command,
    /// Answers a command.
    Reply,
}

impl Header {
    /// The size of a header.
    pub const SIZE: usize = 16;

    /// The header of a command. `size` is filled in when the message is sent.
    pub fn command(id: u16, command: Command, no_reply: bool) -> Header {
        let flags = TYPE_COMMAND | if no_reply { NO_REPLY } else { 0 };
        let command = command.number();
        Header { id, command, size: 0, flags, errno: 0 }
    }

    /// Reads a header.
    pub fn decode(bytes: &[u8; Header::SIZE]) -> Header {
        let [i0, i1, c0, c1, s0, s1, s2, s3, f0, f1, f2, f3, e0, e1, e2, e3] = *bytes;
        Header {
            id: u16::from_ne_bytes([i0, i1]),
            command: u16::from_ne_bytes([c0, c1]),
            size: u32::from_ne_bytes([s0, s1, s2, s3]),
            flags: u32::from_ne_bytes([f0, f1, f2, f3]),
            errno: u32::from_ne_bytes([e0, e1, e2, e3]),
        }
    }

    /// The header as bytes.
    pub fn encode(&self) -> [u8; Header::SIZE] {
        let [i0, i1] = self.id.to_ne_bytes();
        let [c0, c1] = self.command.to_ne_bytes();
        let [s0, s1, s2, s3] = self.size.to_ne_bytes();
        let [f0, f1, f2, f3] = self.flags.to_ne_bytes();
        let [e0, e1, e2, e3] = self.errno.to_ne_bytes();
        [i0, i1, c0, c1, s0, s1, s2, s3, f0, f1, f2, f3, e0, e1, e2, e3]
    }

    /// Command or reply.
    ///
    /// # Errors
    /// EINVAL for a type that the specification does not name.
    pub fn message_type(&self) -> Result<MessageType, Errno> {
        match self.flags & TYPE_MASK {
            TYPE_COMMAND => Ok(MessageType::Command),
            TYPE_REPLY => Ok(MessageType::Reply),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Whether the sender of this command forbids an answer.
    pub fn no_reply(&self) -> bool {
        self.flags & NO_REPLY != 0
    }

    /// The errno of an error reply, `None` when the error flag is clear. An errno of 0 or one that
    /// this host does not know is [`Errno::UnknownErrno`].
    pub fn error(&self) -> Option<Errno> {
        (self.flags & ERROR != 0).then(|| i32::try_from(self.errno).map_or(Errno::UnknownErrno, Errno::from_raw))
    }
}

/// The right to answer one command, once.
///
/// It knows whether the command asked for no reply, so whoever holds it can answer without a look at
/// the header: where no answer may go out, [`Sender`](crate::Sender) sends none. QEMU drops the
/// connection when a no-reply message is answered.
#[must_use = "a command that is never answered hangs the client"]
#[derive(Debug, PartialEq, Eq)]
pub struct ReplyTo {
    id: u16,
    command: u16,
    expected: bool,
}

impl ReplyTo {
    pub(crate) fn new(header: &Header) -> ReplyTo {
        // A reply is never answered. A message of an unknown type is, unless it asks for silence:
        // its sender may wait.
        let is_reply = header.message_type() == Ok(MessageType::Reply);
        let expected = !header.no_reply() && !is_reply;
        ReplyTo { id: header.id, command: header.command, expected }
    }

    /// Whether an answer will go out.
    pub fn expected(&self) -> bool {
        self.expected
    }

    /// The identifier of the message being answered: for logs.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// The command number being answered: for logs.
    pub fn command(&self) -> u16 {
        self.command
    }

    pub(crate) fn header(&self) -> Header {
        Header { id: self.id, command: self.command, size: 0, flags: TYPE_REPLY, errno: 0 }
    }

    pub(crate) fn error_header(&self, errno: Errno) -> Header {
        // Errno values are small and positive; 0 (unknown) is allowed by the specification.
        Header { flags: TYPE_REPLY | ERROR, errno: (errno as i32).unsigned_abs(), ..self.header() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_sixteen_bytes_round_trip(bytes: [u8; 16]) {
            let header = Header::decode(&bytes);
            prop_assert_eq!(header.encode(), bytes);
            let _ = (header.message_type(), header.no_reply(), header.error());
        }
    }

    #[test]
    fn fields_are_where_the_specification_puts_them() {
        let header = Header { id: 0x0102, command: 0x0304, size: 0x0506_0708, flags: 0x090a_0b0c, errno: 0x0d0e_0f10 };
        let mut bytes = Vec::new();
        bytes.extend(0x0102u16.to_ne_bytes());
        bytes.extend(0x0304u16.to_ne_bytes());
        for field in [0x0506_0708u32, 0x090a_0b0c, 0x0d0e_0f10] {
            bytes.extend(field.to_ne_bytes());
        }
        assert_eq!(header.encode().as_slice(), bytes);
    }

    #[test]
    fn flags() {
        let header = |flags| Header { id: 0, command: 1, size: 16, flags, errno: 17 };
        assert_eq!(header(0).message_type(), Ok(MessageType::Command));
        assert_eq!(header(1).message_type(), Ok(MessageType::Reply));
        assert_eq!(header(0x31).message_type(), Ok(MessageType::Reply));
        for unknown in 2..16 {
            assert_eq!(header(unknown).message_type(), Err(Errno::EINVAL));
        }
        assert!(header(0x10).no_reply() && !header(0x20).no_reply());
        assert_eq!(header(0x21).error(), Some(Errno::EEXIST));
        assert_eq!(header(0x01).error(), None);
    }

    #[test]
    fn only_commands_that_wait_are_answered() {
        let header = |flags| Header { id: 9, command: 10, size: 16, flags, errno: 0 };
        assert!(ReplyTo::new(&header(0)).expected());
        assert!(ReplyTo::new(&header(5)).expected());
        assert!(!ReplyTo::new(&header(0x10)).expected());
        assert!(!ReplyTo::new(&header(0x15)).expected());
        assert!(!ReplyTo::new(&header(1)).expected());
    }

    #[test]
    fn an_error_reply_has_flags_0x21() {
        let command = Header::command(7, Command::DmaMap, false);
        let error = ReplyTo::new(&command).error_header(Errno::EEXIST);
        assert_eq!((error.id, error.command), (7, 2));
        assert_eq!((error.flags, error.errno), (0x21, 17));
    }
}
