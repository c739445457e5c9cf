//! What the entries of maps are made of, field by field: read from the type information (BTF) that a datapath keeps of the
//! programs which it was made for. That is how a version reads the maps of any other.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, MapData};
use object::{Object as _, ObjectSection as _};

use crate::dataplane::Pins;
use crate::dataplane::maps::array;

/// Name of the pin that holds the type information: asking the kernel for that of a map needs CAP_SYS_ADMIN.
const PIN: &str = "TYPES";
/// It is kept in pieces of as many bytes.
const PIECE: usize = 4096;

/// A number, an array of numbers, or one of several values: what a key or value consists of in the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Field {
    /// Names of the fields that lead to it, joined by dots.
    pub(super) path: String,
    /// Bytes from the beginning of the entry.
    pub(super) offset: usize,
    /// Bytes.
    pub(super) size: usize,
    /// The values that it may have; any if none are given.
    pub(super) values: Option<Vec<u64>>,
}

/// A key or value.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) fields: Vec<Field>,
    /// Bytes.
    pub(super) size: usize,
}

/// Keys and values of the maps of an object, by the names of the maps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Types(pub(super) BTreeMap<String, (Layout, Layout)>);

impl Types {
    /// Of the maps of an object.
    pub(super) fn of_object(object: &[u8]) -> Result<Self> {
        Self::parse(section(object)?).context("the object's type information cannot be read")
    }

    /// Keeps those of an object beside its maps.
    pub(super) fn pin(object: &[u8], pins: &Pins) -> Result<()> {
        let path = pins.map(PIN);
        let failed = || format!("cannot pin {}", path.display());
        let pieces = section(object)?.chunks(PIECE);
        let mut map = Array::<MapData, [u8; PIECE]>::create(u32::try_from(pieces.len())?, 0).with_context(failed)?;
        for (index, bytes) in (0..).zip(pieces) {
            let mut piece = [0; PIECE];
            piece[..bytes.len()].copy_from_slice(bytes);
            map.set(index, piece, 0).with_context(failed)?;
        }
        map.pin(&path).with_context(failed)
    }

    /// Of the maps that are pinned; none if they were pinned without.
    pub(super) fn pinned(pins: &Pins) -> Result<Option<Self>> {
        let Some(map) = array::<[u8; PIECE]>(pins, PIN)? else { return Ok(None) };
        let failed = || format!("cannot read {}", pins.map(PIN).display());
        let pieces: Vec<_> = map.iter().collect::<Result<_, _>>().with_context(failed)?;
        Ok(Some(Self::parse(&pieces.concat()).with_context(failed)?))
    }

    fn parse(bytes: &[u8]) -> Result<Self> {
        let btf = Btf::parse(bytes).context("it is no BTF")?;
        let mut maps = BTreeMap::new();
        for kind in btf.types.iter().filter(|kind| kind.number == Kind::VAR) {
            let Some((name, key, value)) = btf.map(kind) else { continue };
            let (mut key_layout, mut value_layout) = (Layout::default(), Layout::default());
            for (id, layout) in [(key, &mut key_layout), (value, &mut value_layout)] {
                layout.size = btf.size(id).with_context(|| format!("type {id} of {name}"))?;
                btf.collect(id, "", 0, &mut layout.fields).with_context(|| format!("type {id} of {name}"))?;
            }
            maps.insert(name.to_owned(), (key_layout, value_layout));
        }
        ensure!(!maps.is_empty(), "it describes no maps");
        Ok(Self(maps))
    }
}

fn section(object: &[u8]) -> Result<&[u8]> {
    let file = object::File::parse(object).context("the object is no ELF file")?;
    let section = file.section_by_name(".BTF").context("the object has no type information")?;
    Ok(section.data()?)
}

/// Type information as the kernel has it (Documentation/bpf/btf.rst).
struct Btf<'a> {
    strings: &'a [u8],
    /// By id; the first stands for "void".
    types: Vec<Kind<'a>>,
}

struct Kind<'a> {
    number: u32,
    name: u32,
    /// Size in bytes, or the id of another type.
    size_or_type: u32,
    /// What follows, by words.
    data: &'a [u8],
}

impl Kind<'_> {
    const INT: u32 = 1;
    const PTR: u32 = 2;
    const ARRAY: u32 = 3;
    const STRUCT: u32 = 4;
    const ENUM: u32 = 6;
    const VAR: u32 = 14;

    /// Words that follow a type of this kind: so many, and so many for each of its members.
    const fn words(number: u32) -> Option<(usize, usize)> {
        Some(match number {
            Self::INT | Self::VAR | 17 => (1, 0),
            Self::PTR | 7..=12 | 16 | 18 => (0, 0),
            Self::ARRAY => (3, 0),
            Self::STRUCT | 5 | 15 | 19 => (0, 3),
            Self::ENUM | 13 => (0, 2),
            _ => return None,
        })
    }

    fn word(&self, index: usize) -> Option<u32> {
        word(self.data, index * 4)
    }

    /// What each member has, by words.
    fn members<const N: usize>(&self) -> impl Iterator<Item = [u32; N]> {
        let words = |member: &[u8]| std::array::from_fn(|index| word(member, index * 4).unwrap_or_default());
        self.data.chunks_exact(N * 4).map(words)
    }
}

impl<'a> Btf<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        const MAGIC: u32 = 0x1_eb9f;
        if word(bytes, 0)? & 0x00ff_ffff != MAGIC {
            return None;
        }
        let header = word(bytes, 4)? as usize;
        let part = |at: usize| {
            let start = header.checked_add(word(bytes, at)? as usize)?;
            bytes.get(start..start.checked_add(word(bytes, at + 4)? as usize)?)
        };
        let (mut rest, strings) = (part(8)?, part(16)?);
        let mut types = vec![Kind { number: 0, name: 0, size_or_type: 0, data: &[] }];
        while !rest.is_empty() {
            let info = word(rest, 4)?;
            let (number, members) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            let (words, each) = Kind::words(number)?;
            let end = 12 + (words + each * members) * 4;
            let (name, size_or_type) = (word(rest, 0)?, word(rest, 8)?);
            types.push(Kind { number, name, size_or_type, data: rest.get(12..end)? });
            rest = rest.get(end..)?;
        }
        Some(Self { strings, types })
    }

    fn name(&self, offset: u32) -> Option<&'a str> {
        let name = self.strings.get(offset as usize..)?;
        std::str::from_utf8(&name[..name.iter().position(|&byte| byte == 0)?]).ok()
    }

    fn kind(&self, id: u32) -> Option<&Kind<'a>> {
        self.types.get(id as usize)
    }

    /// If a variable is a map: its name, and the types of keys and values, which it has as pointers to them.
    fn map(&self, variable: &Kind<'_>) -> Option<(&'a str, u32, u32)> {
        let definition = self.kind(variable.size_or_type).filter(|kind| kind.number == Kind::STRUCT)?;
        let pointed = |wanted: &str| {
            let mut members = definition.members::<3>();
            let [_, pointer, _] = members.find(|&[name, ..]| self.name(name) == Some(wanted))?;
            self.kind(pointer).filter(|kind| kind.number == Kind::PTR).map(|pointer| pointer.size_or_type)
        };
        Some((self.name(variable.name)?, pointed("key")?, pointed("value")?))
    }

    fn size(&self, id: u32) -> Option<usize> {
        let kind = self.kind(id)?;
        match kind.number {
            Kind::INT | Kind::STRUCT | Kind::ENUM => Some(kind.size_or_type as usize),
            Kind::ARRAY => self.size(kind.word(0)?)?.checked_mul(kind.word(2)? as usize),
            _ => None,
        }
    }

    /// Adds the fields of a type at an offset. `None`: there is something in it that no entry of ours has.
    fn collect(&self, id: u32, path: &str, offset: usize, fields: &mut Vec<Field>) -> Option<()> {
        const IS_BOOL: u32 = 4 << 24;
        let (kind, size) = (self.kind(id)?, self.size(id)?);
        let mut field = |values| fields.push(Field { path: path.to_owned(), offset, size, values });
        match kind.number {
            Kind::INT => field((kind.word(0)? & IS_BOOL != 0).then(|| vec![0, 1])),
            Kind::ENUM => field(Some(kind.members::<2>().map(|[_, value]| value.into()).collect())),
            Kind::ARRAY => {
                let element = kind.word(0)?;
                if self.kind(element)?.number == Kind::INT {
                    field(None);
                    return Some(());
                }
                let each = self.size(element)?;
                for index in 0..kind.word(2)? {
                    self.collect(element, &format!("{path}.{index}"), offset + index as usize * each, fields)?;
                }
            }
            Kind::STRUCT => {
                for [name, id, bits] in kind.members::<3>() {
                    let path = format!("{path}.{}", self.name(name)?);
                    self.collect(id, &path, offset + bits as usize / 8, fields)?;
                }
            }
            _ => return None,
        }
        Some(())
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use lb_common::Tuple4;
    use lb_common::abi::Flow4;

    use super::*;
    use crate::dataplane::OBJECT;

    #[test]
    fn the_programs_tell_what_their_maps_hold() {
        let types = Types::of_object(OBJECT).unwrap();
        let (key, value) = &types.0["FLOWS_4"];
        assert_eq!((key.size, value.size), (size_of::<Tuple4>(), size_of::<Flow4>()));
        let field = |path: &str| value.fields.iter().find(|field| field.path == path).unwrap();
        assert_eq!(field(".to.source_port").size, 2);
        assert_eq!(field(".to.protocol").values, Some(vec![6, 17, 132]));
        assert_eq!(field(".fin").values, Some(vec![0, 1]));
        assert_eq!(field(".last_seen").offset, std::mem::offset_of!(Flow4, last_seen));
        let fields: usize = value.fields.iter().map(|field| field.size).sum();
        assert_eq!(fields, value.size, "no byte of an entry is without a field");
        assert!(["FRONTENDS_6", "SLOTS", "SERVICE_NAMES", "REASONS"].iter().all(|map| types.0.contains_key(*map)));
    }

    #[test]
    fn what_is_cut_short_is_no_type_information() {
        let section = section(OBJECT).unwrap();
        assert!(Types::parse(section).is_ok());
        for length in [0, 3, 24, 1000, section.len() - 1] {
            assert!(Types::parse(&section[..length]).is_err(), "{length} bytes");
        }
        let mut padded = section.to_vec();
        padded.resize(section.len() + 4096, 0);
        assert_eq!(Types::parse(&padded).unwrap(), Types::parse(section).unwrap());
    }
}
