//! The commands that only say something: about a configuration, or about the command itself.

use std::fs;

use crate::binary::command;

/// Runs `vfio-user-blk`: its status, and what it says on standard output and on standard error.
fn say(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = command().args(arguments).output().unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    (output.status.code(), out, err)
}

#[test]
fn a_configuration_is_checked_and_nothing_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("server.toml");
    let file = path.to_str().unwrap();
    let image = folder.path().join("disk.img");
    let config = format!("[[device]]\nsocket_path = \"/no/such/blk.sock\"\nblk_file = {image:?}\nsize = \"1M\"\n");
    fs::write(&path, &config).unwrap();
    let (status, out, err) = say(&["check", file]);
    assert_eq!((status, err.as_str()), (Some(0), ""));
    assert!(out.contains("server.toml: fine: 1 device,") && out.contains("/no/such/blk.sock"), "{out}");
    assert!(!image.exists());
    // Each with its place, and the same from `serve`.
    for (wrong, words) in [
        ("queue_size = 100", &["server.toml: line 5: device 1", "queue_size is 100", "power of two"][..]),
        ("colour = \"red\"", &["line 5", "unknown field `colour`", "socket_path"]),
        ("store = \"tape\"", &["line 5", "tape", "`memory`"]),
    ] {
        fs::write(&path, format!("{config}{wrong}\n")).unwrap();
        for arguments in [&["check", file][..], &["serve", "--config", file]] {
            let (status, out, err) = say(arguments);
            assert_eq!((status, out.as_str()), (Some(78), ""), "{err}");
            words.iter().for_each(|words| assert!(err.contains(words), "{wrong} does not say {words:?}:\n{err}"));
        }
    }
    fs::remove_file(&path).unwrap();
    assert_eq!(say(&["check", file]).0, Some(78));
}

#[test]
fn the_status_says_what_kind_of_failure_it_was() {
    assert_eq!(say(&["serve"]).0, Some(2));
    assert_eq!(say(&["serve", "--turbo"]).0, Some(2));
    assert_eq!(say(&["serve", "--workers", "1"]).0, Some(2), "nothing to serve");
    assert_eq!(say(&["serve", "--socket-path", "a", "--queue-size", "3"]).0, Some(78));
    assert_eq!(say(&["serve", "--socket-path", "/no/such/folder/a"]).0, Some(1));
}

#[test]
fn it_describes_itself() {
    let (status, bash, _) = say(&["completions", "bash"]);
    assert!(status == Some(0) && bash.contains("--queue-size") && bash.contains("vfio-user-blk"), "{bash}");
    for shell in ["zsh", "fish"] {
        assert!(say(&["completions", shell]).1.contains("queue-size"));
    }
    assert_eq!(say(&["completions", "cobol"]).0, Some(2));
    let (status, page, _) = say(&["man", "serve"]);
    assert!(status == Some(0) && page.contains(".SH \"EXIT STATUS\"") && page.contains("\\-\\-queue\\-size"), "{page}");
    let (status, _, err) = say(&["man", "srve"]);
    assert!(status == Some(1) && err.contains("serve"), "{err}");
}
