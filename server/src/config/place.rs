//! Where in a configuration file something stands.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// The line, from 1, of what an error is about. The error's text begins with the key: with that of the `number`th device,
/// or one above the first table. Without such a key it is the line where the device begins, or the first.
pub(super) fn line(text: &str, number: Option<usize>, error: &str) -> usize {
    let key = error.split(|c: char| !(c.is_ascii_lowercase() || c == '_')).next().unwrap_or_default();
    let offset = offset(text, number, key).unwrap_or(0);
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count().saturating_add(1)
}

fn offset(text: &str, number: Option<usize>, key: &str) -> Option<usize> {
    let file = DeTable::parse(text).ok()?;
    let Some(number) = number else { return key_offset(file.get_ref(), key) };
    let devices = file.get_ref().iter().find(|(name, _)| name.get_ref() == "device")?.1.get_ref().as_array()?;
    let device: &Spanned<DeValue<'_>> = devices.get(number.checked_sub(1)?)?;
    key_offset(device.get_ref().as_table()?, key).or(Some(device.span().start))
}

fn key_offset(table: &DeTable<'_>, key: &str) -> Option<usize> {
    table.keys().find(|name| name.get_ref() == key).map(|name| name.span().start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_in_its_table() {
        let text = "# two\nworkers = 2\n\n[[device]]\nsize = 1\n[[device]]\n# here\nsize = 2\n";
        for (number, error, expected) in [
            (None, "workers is 2000", 2),
            (None, "nothing known", 1),
            (Some(1), "size is 1", 5),
            (Some(2), "size is 2", 8),
            (Some(2), "serial \"x\"", 6),
            (Some(2), "", 6),
            (Some(3), "size", 1),
            (Some(0), "size", 1),
        ] {
            assert_eq!(line(text, number, error), expected, "{number:?} {error}");
        }
        assert_eq!(line("no toml", Some(1), "size"), 1);
        assert_eq!(line("device = [{ size = 3 }]", Some(1), "size"), 1);
    }
}
