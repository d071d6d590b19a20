//! A copy of the source that may be changed, and its build, which is kept.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::Mutant;
use crate::models::{Build, target, workspace};

pub(crate) struct Tree {
    path: PathBuf,
    build: PathBuf,
}

/// A file that is changed, until this is dropped.
pub(super) struct Changed {
    file: PathBuf,
    original: String,
}

impl Drop for Changed {
    fn drop(&mut self) {
        if let Err(error) = fs::write(&self.file, &self.original) {
            eprintln!("{} stays changed: {error}", self.file.display());
        }
    }
}

impl Tree {
    /// Copies what git knows or would know. A file that has not changed since the last copy is left alone, so that cargo
    /// builds anew only what must be.
    pub(crate) fn copy() -> Result<Self> {
        let path = target().join("ordering/tree");
        let build = target().join("ordering/build");
        let output = Command::new("git")
            .current_dir(workspace())
            .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
            .output()
            .context("cannot run git to list the source")?;
        ensure!(output.status.success(), "git can't list the source: {}", String::from_utf8_lossy(&output.stderr));
        for name in String::from_utf8(output.stdout)?.split_terminator('\0') {
            let (from, to) = (workspace().join(name), path.join(name));
            if !from.is_file() {
                // Deleted, and git has not been told.
                continue;
            }
            let bytes = fs::read(&from).with_context(|| format!("cannot read {name}"))?;
            if fs::read(&to).is_ok_and(|there| there == bytes) {
                continue;
            }
            if let Some(dir) = to.parent() {
                fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
            }
            fs::write(&to, bytes).with_context(|| format!("cannot write {}", to.display()))?;
        }
        Ok(Tree { path, build })
    }

    /// How models are compiled, and all that mutants are shown to: other flags would be another build of everything.
    pub(crate) fn models(&self) -> Build {
        Build { tree: self.path.clone(), target: self.build.clone(), loom: true, release: false }
    }

    /// How the stress is compiled, when it is to be told from what is shipped by the mutant alone.
    pub(super) fn release(&self) -> Build {
        Build { loom: false, release: true, ..self.models() }
    }

    /// Whether a mutant fits the source.
    ///
    /// # Errors
    /// When a text is not where the list says, exactly once: the source has changed and the list must follow.
    pub(super) fn check(&self, mutant: &Mutant) -> Result<()> {
        self.edited(mutant).map(drop)
    }

    /// Applies a mutant.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub(super) fn change(&self, mutant: &Mutant) -> Result<Changed> {
        let (file, original, changed) = self.edited(mutant)?;
        fs::write(&file, changed).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(Changed { file, original })
    }

    /// The file, what is in it, and what the mutant makes of that.
    fn edited(&self, mutant: &Mutant) -> Result<(PathBuf, String, String)> {
        let file = self.path.join(mutant.file);
        let original = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let changed = edit(&original, mutant).with_context(|| format!("{}, in {}", mutant.name, mutant.file))?;
        Ok((file, original, changed))
    }
}

/// The text with the mutant's edits in its function.
fn edit(text: &str, mutant: &Mutant) -> Result<String> {
    let function = mutant.function;
    let (before, rest) = text.split_once(function).with_context(|| format!("no {function:?}"))?;
    ensure!(!rest.contains(function), "more than one {function:?}");
    // Up to the next line with a closing brace indented like the function.
    let indent: String = before.chars().rev().take_while(|c| *c != '\n').collect();
    let indent: String = indent.chars().rev().take_while(|c| *c == ' ').collect();
    let end = format!("\n{indent}}}\n");
    let (body, after) = rest.split_once(&end).with_context(|| format!("no end of {function:?}"))?;
    let mut body = body.to_owned();
    for (old, new) in &mutant.edits {
        let count = body.matches(old).count();
        ensure!(count == 1, "{old:?} is {count} times in {function:?}, not once");
        body = body.replace(old, new);
    }
    Ok(format!("{before}{function}{body}{end}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "impl A {\n    pub fn a(&self) {\n        x();\n        y();\n    }\n\n    fn b() {\n        x();\n    }\n}\n";

    fn edited(function: &'static str, old: &'static str, new: &str) -> Result<String> {
        let edits = vec![(old, new.to_owned())];
        edit(TEXT, &Mutant { name: String::new(), file: "", function, edits, killers: &[] })
    }

    #[test]
    fn an_edit_stays_in_its_function() {
        assert_eq!(edited("fn a(", "x();", "z();").unwrap(), TEXT.replacen("x();", "z();", 1));
        let second = TEXT.rfind("x();").unwrap();
        assert_eq!(edited("fn b(", "x();", "").unwrap(), format!("{}{}", &TEXT[..second], &TEXT[second + 4..]));
    }

    #[test]
    fn a_list_that_does_not_fit_is_an_error() {
        assert!(edited("fn c(", "x();", "").is_err());
        assert!(edited("fn ", "x();", "").is_err(), "two of them");
        assert!(edited("fn b(", "y();", "").is_err());
        assert!(edited("fn a(", "();", "").is_err());
    }
}
