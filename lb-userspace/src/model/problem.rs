//! What is wrong with an object, said in one line: where, which object, which field, what to do.

use std::fmt::{self, Write as _};
use std::path::Path;
use std::sync::Arc;

/// Where an object was read.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    /// A file or folder.
    File {
        /// As the user wrote it.
        path: Arc<Path>,
        /// First line of the document or list item, from 1; 0 for the file as a whole.
        line: u32,
    },
    /// The API server: the name of the object says where.
    Api,
}

/// Something that could not be taken as it is written. Display gives one line, whatever the input holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where it was read.
    pub origin: Origin,
    /// Kind and name, such as `Service default/web`; empty where there is none.
    pub object: String,
    /// Path of the field, such as `spec.ports[1].port`; empty for the object as a whole.
    pub field: String,
    /// What is wrong and what to do about it.
    pub message: String,
}

impl Problem {
    /// A problem of a file rather than of an object in it.
    pub fn of(origin: Origin, message: impl Into<String>) -> Self {
        Self { origin, object: String::new(), field: String::new(), message: message.into() }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line: 0 } => write!(f, "{}", path.display()),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Api => f.write_str("the API server"),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = OneLine(f);
        if self.origin != Origin::Api {
            write!(line, "{}: ", self.origin)?;
        }
        for part in [&self.object, &self.field] {
            if !part.is_empty() {
                write!(line, "{part}: ")?;
            }
        }
        line.write_str(&self.message)
    }
}

/// Replaces line breaks and other control characters, which input can smuggle in, by spaces.
struct OneLine<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl fmt::Write for OneLine<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|c| self.0.write_char(if c.is_control() { ' ' } else { c }))
    }
}

/// Collects the problems of one object, and keeps a broken object from flooding the log.
#[derive(Debug)]
pub struct Problems {
    origin: Origin,
    object: String,
    first: Vec<Problem>,
    more: usize,
}

impl Problems {
    /// How many problems of one object are told.
    pub const LIMIT: usize = 10;

    /// No problems yet.
    pub fn new(origin: Origin, object: impl Into<String>) -> Self {
        Self { origin, object: object.into(), first: Vec::new(), more: 0 }
    }

    /// Notes a problem of one field.
    pub fn add(&mut self, field: impl Into<String>, message: impl Into<String>) {
        if self.first.len() == Self::LIMIT {
            self.more += 1;
            return;
        }
        self.first.push(self.problem(field, message));
    }

    /// A problem of this object, not noted here: for one that makes the whole object unusable.
    #[must_use]
    pub fn problem(&self, field: impl Into<String>, message: impl Into<String>) -> Problem {
        Problem {
            origin: self.origin.clone(),
            object: self.object.clone(),
            field: field.into(),
            message: message.into(),
        }
    }

    /// The first problems, and a line with the number of the others.
    #[must_use]
    pub fn finish(mut self) -> Vec<Problem> {
        if self.more > 0 {
            let rest = self.problem("", format!("... and {} more problems", self.more));
            self.first.push(rest);
        }
        self.first
    }
}
