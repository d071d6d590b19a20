//! A process that may open no more descriptors. Alone in its file: the limit is the process's.

use std::io::{IoSlice, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::libc;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vfio_user::{Command, Connection, Errno, Header, Limits, Received};

/// Those that the kernel could still open come in, and none of them may stay open.
#[test]
fn descriptors_that_cannot_be_opened_refuse_the_message() {
    let (peer, stream) = UnixStream::pair().unwrap();
    let mut connection = Connection::new(stream, Limits::default()).unwrap();
    let (mut reader, writer) = std::io::pipe().unwrap();

    let rights = [ControlMessage::ScmRights(&[writer.as_raw_fd(); 8])];
    let header = Header { size: 16, ..Header::command(3, Command::DeviceReset, false) }.encode();
    let iov = [IoSlice::new(&header)];
    sendmsg::<()>(peer.as_raw_fd(), &iov, &rights, MsgFlags::empty(), None).unwrap();
    drop(writer);

    // Room for some of them: the numbers up to the highest in use, which was the writer's, and two.
    let limit = libc::rlimit { rlim_cur: reader.as_raw_fd() as u64 + 4, rlim_max: 1024 };
    // SAFETY: the argument lives across the call.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);

    let Received::Refused { reply_to, errno } = connection.receiver.receive().unwrap() else {
        panic!("not refused");
    };
    assert_eq!((reply_to.id(), errno), (3, Errno::EMFILE));
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    assert!(matches!(connection.receiver.receive(), Ok(Received::WouldBlock)));
}
