//! Lists of small numbers as people write them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, de};

/// One more than the largest number, and the most of them: what the kernel's processor masks hold.
const LIMIT: usize = 1024;

/// A list of processors or workers, which count from 0: `0,2,4-7`, and in a file also `[0, 2, "4-7"]`. Never empty.
/// Its order counts, and a number may come twice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NumberList(Vec<usize>);

/// A list that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no list of at most {LIMIT} numbers below {LIMIT}: write numbers and ranges, such as 0,2,4-7")]
pub struct NumberListError(String);

impl NumberList {
    /// The numbers; at least one.
    pub fn as_slice(&self) -> &[usize] {
        &self.0
    }

    /// The number at `index`, where after the last the first comes again.
    pub fn around(&self, index: usize) -> Option<usize> {
        self.0.get(index.checked_rem(self.0.len())?).copied()
    }
}

/// The numbers from the first to the last, each of which is in bounds.
fn range(text: &str) -> Option<std::ops::RangeInclusive<usize>> {
    let number = |digits: &str| {
        let digits = digits.trim();
        let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        digits.parse().ok().filter(|number| plain && *number < LIMIT)
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (number(first)?, number(last)?);
    (first <= last).then_some(first..=last)
}

impl FromStr for NumberList {
    type Err = NumberListError;

    fn from_str(text: &str) -> Result<Self, NumberListError> {
        let mut numbers = Vec::new();
        for part in text.split(',') {
            let range = range(part).filter(|range| numbers.len() + range.clone().count() <= LIMIT);
            numbers.extend(range.ok_or_else(|| NumberListError(text.to_owned()))?);
        }
        Ok(Self(numbers))
    }
}

impl fmt::Display for NumberList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, number) in self.0.iter().enumerate() {
            write!(f, "{}{number}", if place == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for NumberList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// A number, or a string of them: an element of an array, or all of it.
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a number, or a range such as \"4-7\"")]
        enum Part {
            Number(u64),
            Text(String),
        }

        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = NumberList;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of numbers such as [0, 2, \"4-7\"] or \"0,2,4-7\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<NumberList, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut parts: A) -> Result<NumberList, A::Error> {
                let mut text = Vec::new();
                while let Some(part) = parts.next_element()? {
                    text.push(match part {
                        Part::Number(number) => number.to_string(),
                        Part::Text(text) => text,
                    });
                }
                self.visit_str(&text.join(","))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_written() {
        let full = (0..LIMIT).collect::<Vec<_>>();
        for (text, numbers, again) in [
            ("0", vec![0], "0"),
            ("3,1,1", vec![3, 1, 1], "3,1,1"),
            ("0, 2, 4-7", vec![0, 2, 4, 5, 6, 7], "0,2,4,5,6,7"),
            ("5-5", vec![5], "5"),
        ] {
            let list: NumberList = text.parse().unwrap();
            assert_eq!((list.as_slice(), list.to_string().as_str()), (&*numbers, again), "{text}");
        }
        assert_eq!("0-1023".parse::<NumberList>().unwrap().as_slice(), full);
        for text in ["", ",", "0,", "-1", "1-", "4-2", "x", "1-2-3", "1024", "0-99999999999", "0-1023,0", "+1", "1.5"] {
            assert!(text.parse::<NumberList>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_file_may_have_arrays_or_strings() {
        #[derive(Deserialize)]
        struct File {
            list: NumberList,
        }
        for (text, numbers) in [("[0, 2, \"4-5\"]", vec![0, 2, 4, 5]), ("\"1-2\"", vec![1, 2])] {
            let file: File = toml::from_str(&format!("list = {text}")).unwrap();
            assert_eq!(file.list.as_slice(), numbers);
        }
        for (text, words) in [("[]", "no list"), ("[-1]", "4-7"), ("[1024]", "below 1024"), ("7", "such as [0, 2")] {
            let error = toml::from_str::<File>(&format!("list = {text}")).map(|file| file.list).unwrap_err();
            assert!(error.to_string().contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn after_the_last_comes_the_first() {
        let list: NumberList = "3,5".parse().unwrap();
        assert_eq!([0, 1, 2, 63].map(|index| list.around(index)), [Some(3), Some(5), Some(3), Some(5)]);
    }
}
