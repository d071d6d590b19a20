//! The arrows of ARCHITECTURE.md between the members of the workspace: there are no others.

#![allow(clippy::unwrap_used, reason = "a failure is the result of a test")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};

/// For each member, the members that it may depend on. Those that only run things may see what they need.
const ALLOWED: [(&str, &[&str]); 5] = [
    ("pci", &[]),
    ("vfio-user", &[]),
    ("virtio", &["pci"]),
    // The client for the binary's `bench` alone: see `only_the_binary_knows_both`.
    ("vfio-user-blk", &["client", "pci", "vfio-user", "virtio"]),
    ("client", &["vfio-user"]),
];
const UNBOUND: [&str; 2] = ["testbed", "xtask"];

/// The arrows between members, without or with those that only tests have.
fn arrows(metadata: &Metadata, tests: bool) -> BTreeMap<String, BTreeSet<String>> {
    let members: BTreeSet<_> = metadata.workspace_packages().iter().map(|package| package.name.to_string()).collect();
    let to = |package: &cargo_metadata::Package| {
        let dependencies = package.dependencies.iter();
        let counted = dependencies.filter(|dependency| tests || dependency.kind != DependencyKind::Development);
        counted.map(|dependency| dependency.name.clone()).filter(|name| members.contains(name)).collect()
    };
    metadata.workspace_packages().iter().map(|package| (package.name.to_string(), to(package))).collect()
}

fn metadata() -> Metadata {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
    MetadataCommand::new().manifest_path(manifest).no_deps().exec().unwrap()
}

/// All that a member sees, by whatever way.
fn reachable<'a>(arrows: &'a BTreeMap<String, BTreeSet<String>>, from: &'a str) -> BTreeSet<&'a str> {
    let mut seen = BTreeSet::new();
    let mut next = vec![from];
    while let Some(member) = next.pop() {
        for to in &arrows[member] {
            if seen.insert(to.as_str()) {
                next.push(to);
            }
        }
    }
    seen
}

#[test]
fn only_the_allowed_arrows_exist() {
    let mut arrows = arrows(&metadata(), false);
    arrows.retain(|member, _| !UNBOUND.contains(&member.as_str()));
    let members: BTreeSet<_> = arrows.keys().map(String::as_str).collect();
    let known: BTreeSet<_> = ALLOWED.iter().map(|(member, _)| *member).collect();
    assert_eq!(members, known, "a new member needs its place in the house, here and in ARCHITECTURE.md");
    for (member, allowed) in ALLOWED {
        for to in &arrows[member] {
            assert!(allowed.contains(&to.as_str()), "{member} must not depend on {to}");
        }
    }
}

#[test]
fn nobody_depends_on_what_only_runs_things() {
    for (member, to) in arrows(&metadata(), true) {
        if !UNBOUND.contains(&member.as_str()) {
            assert!(!UNBOUND.iter().any(|unbound| to.contains(*unbound)), "{member} sees {to:?}");
        }
    }
}

#[test]
fn the_client_knows_no_server() {
    let arrows = arrows(&metadata(), true);
    assert_eq!(reachable(&arrows, "client"), BTreeSet::from(["vfio-user"]));
}

/// The library and the binary of the server are one package, so cargo lets both see the client.
#[test]
fn only_the_binary_knows_both() {
    let sources = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../server/src"));
    let binary = [sources.join("main.rs"), sources.join("bench"), sources.join("bench.rs")];
    let mut folders = vec![sources.to_owned()];
    let mut seen = 0;
    while let Some(folder) = folders.pop() {
        // There, `client` is a module of the library's own.
        let own = folder.join("client.rs").exists();
        for path in fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            if binary.contains(&path) {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let mut names = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            assert!(own || !names.any(|line| line.contains(" client::")), "{} knows the client", path.display());
            seen += 1;
        }
    }
    assert!(seen > 20, "where is the server?");
}
