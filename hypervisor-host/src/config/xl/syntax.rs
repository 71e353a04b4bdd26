//! The syntax of xl's configuration files: assignments of numbers, texts and lists, one a line or after a `;`.

use crate::config::Wrong;

/// Lists in lists.
const DEPTH: usize = 8;

/// A value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Item {
    Number(i64),
    Text(String),
    /// With the line of each.
    List(Vec<(Item, usize)>),
}

/// `key = value`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Assignment {
    pub(super) key: String,
    pub(super) value: Item,
    pub(super) line: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    Number(i64),
    Text(String),
    Sign(char),
    /// `+=`
    Append,
    /// The end of a line, or `;`.
    End,
}

struct Lexer<'a> {
    rest: std::iter::Peekable<std::str::Chars<'a>>,
    line: usize,
}

impl Lexer<'_> {
    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> String {
        let mut text = String::new();
        while let Some(c) = self.rest.next_if(|c| wanted(*c)) {
            text.push(c);
        }
        text
    }

    /// A text up to its own kind of quote, which does not span lines; escapes are those of C.
    fn text(&mut self, quote: char) -> Result<String, Wrong> {
        let line = self.line;
        let open = || (line, format!("a text that begins with {quote} has no end on its line"));
        let mut text = String::new();
        loop {
            match self.rest.next() {
                None | Some('\n') => return Err(open()),
                Some(c) if c == quote => return Ok(text),
                Some('\\') => {
                    let escaped = match self.rest.next() {
                        None | Some('\n') => return Err(open()),
                        Some('a') => '\x07',
                        Some('b') => '\x08',
                        Some('f') => '\x0c',
                        Some('n') => '\n',
                        Some('r') => '\r',
                        Some('t') => '\t',
                        Some('v') => '\x0b',
                        Some('x') => self.code(16, 2, None)?,
                        Some(digit @ '0'..='7') => self.code(8, 3, Some(digit))?,
                        Some(other) => other,
                    };
                    text.push(escaped);
                }
                Some(c) => text.push(c),
            }
        }
    }

    /// A character by its number: at most `most` digits.
    fn code(&mut self, radix: u32, most: usize, first: Option<char>) -> Result<char, Wrong> {
        let mut digits: String = first.into_iter().collect();
        while digits.len() < most
            && let Some(digit) = self.rest.next_if(|c| c.is_digit(radix))
        {
            digits.push(digit);
        }
        let code = u32::from_str_radix(&digits, radix).ok();
        code.and_then(char::from_u32)
            .filter(|c| *c != '\0')
            .ok_or_else(|| (self.line, "a \\ with a number that is no character".into()))
    }

    fn next(&mut self) -> Result<Option<(Token, usize)>, Wrong> {
        self.take_while(|c| matches!(c, ' ' | '\t' | '\r'));
        if self.rest.peek() == Some(&'#') {
            self.take_while(|c| c != '\n');
        }
        let line = self.line;
        let Some(c) = self.rest.peek().copied() else { return Ok(None) };
        let token = match c {
            '\n' | ';' => {
                self.rest.next();
                self.line += usize::from(c == '\n');
                Token::End
            }
            '\'' | '"' => {
                self.rest.next();
                Token::Text(self.text(c)?)
            }
            '=' | '[' | ']' | ',' => {
                self.rest.next();
                Token::Sign(c)
            }
            '+' => {
                self.rest.next();
                if self.rest.next_if_eq(&'=').is_none() {
                    return Err((line, "a + without =".into()));
                }
                Token::Append
            }
            '0'..='9' | '-' => {
                let word = self.take_while(|c| c.is_ascii_alphanumeric() || c == '-');
                let hex = word.strip_prefix("0x").or_else(|| word.strip_prefix("0X"));
                let number = match hex {
                    Some(digits) => i64::from_str_radix(digits, 16),
                    None => word.parse(),
                };
                Token::Number(number.map_err(|_| (line, format!("`{word}` is no number")))?)
            }
            c if c.is_ascii_alphabetic() || c == '_' => {
                Token::Word(self.take_while(|c| c.is_ascii_alphanumeric() || c == '_'))
            }
            c => return Err((line, format!("`{c}` has no meaning here"))),
        };
        Ok(Some((token, line)))
    }
}

struct Parser {
    tokens: std::iter::Peekable<std::vec::IntoIter<(Token, usize)>>,
    line: usize,
}

impl Parser {
    fn next(&mut self) -> Option<Token> {
        let (token, line) = self.tokens.next()?;
        self.line = line;
        Some(token)
    }

    fn skip_lines(&mut self) {
        while self.tokens.next_if(|(token, _)| *token == Token::End).is_some() {}
    }

    fn value(&mut self, depth: usize) -> Result<Item, Wrong> {
        match self.next() {
            Some(Token::Text(text)) => Ok(Item::Text(text)),
            Some(Token::Number(number)) => Ok(Item::Number(number)),
            Some(Token::Sign('[')) if depth < DEPTH => self.list(depth + 1),
            Some(Token::Sign('[')) => Err((self.line, "lists in lists without end".into())),
            Some(Token::Word(word)) => {
                Err((self.line, format!("`{word}` needs quotes: only numbers go without")))
            }
            _ => {
                Err((self.line, "a value is missing: a number, a text in quotes, or a list".into()))
            }
        }
    }

    /// Behind its `[`; lines mean nothing inside, and a comma may follow the last.
    fn list(&mut self, depth: usize) -> Result<Item, Wrong> {
        let begin = self.line;
        let open = || (begin, "a list that begins here has no ]".to_owned());
        let mut items = Vec::new();
        loop {
            self.skip_lines();
            if self.tokens.next_if(|(token, _)| *token == Token::Sign(']')).is_some() {
                return Ok(Item::List(items));
            }
            if self.tokens.peek().is_none() {
                return Err(open());
            }
            let item = self.value(depth)?;
            items.push((item, self.line));
            self.skip_lines();
            match self.next() {
                Some(Token::Sign(',')) => {}
                Some(Token::Sign(']')) => return Ok(Item::List(items)),
                None => return Err(open()),
                Some(_) => return Err((self.line, "a comma or ] is missing in a list".into())),
            }
        }
    }
}

/// The assignments of a file. Of several to one key the last counts, as in xl; `+=` adds to lists and texts.
pub(super) fn parse(text: &str) -> Result<Vec<Assignment>, Wrong> {
    let mut lexer = Lexer { rest: text.chars().peekable(), line: 1 };
    let mut tokens = Vec::new();
    while let Some(token) = lexer.next()? {
        tokens.push(token);
    }
    let mut parser = Parser { tokens: tokens.into_iter().peekable(), line: 1 };
    let mut assignments: Vec<Assignment> = Vec::new();
    loop {
        parser.skip_lines();
        let Some(first) = parser.next() else { return Ok(assignments) };
        let line = parser.line;
        let Token::Word(key) = first else {
            return Err((line, "a line begins with the name of a key".into()));
        };
        let append = match parser.next() {
            Some(Token::Sign('=')) => false,
            Some(Token::Append) => true,
            _ => return Err((line, format!("`{key}`: = is missing"))),
        };
        let value = parser.value(0)?;
        match parser.next() {
            None | Some(Token::End) => {}
            Some(_) => return Err((parser.line, format!("`{key}`: something follows its value"))),
        }
        let place = assignments.iter_mut().find(|assignment| assignment.key == key);
        match (place, append) {
            (None, _) => assignments.push(Assignment { key, value, line }),
            (Some(place), false) => (place.value, place.line) = (value, line),
            (Some(place), true) => match (&mut place.value, value) {
                (Item::Text(text), Item::Text(more)) => text.push_str(&more),
                (Item::List(list), Item::List(more)) => list.extend(more),
                _ => {
                    return Err((
                        line,
                        format!("`{key}`: += adds a list to a list, or a text to a text"),
                    ));
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_numbers_and_lists_are_read() {
        let text = "# a guest\nname = \"a # b\" ; memory=0x40\nextra = 'it\\'s \\x41\\101'\n\
                    disk = [ # two\n  'a,b',\n\n  \"c\",\n]\nempty=[]\nmemory = 64\nextra += '!'\ndisk += ['d']";
        let found = parse(text).unwrap();
        let value = |key: &str| found.iter().find(|a| a.key == key).map(|a| a.value.clone());
        let text = |text: &str| Item::Text(text.into());
        assert_eq!(value("name"), Some(text("a # b")));
        assert_eq!(value("memory"), Some(Item::Number(64)));
        assert_eq!(value("extra"), Some(text("it's AA!")));
        let list = vec![(text("a,b"), 5), (text("c"), 7), (text("d"), 12)];
        assert_eq!(value("disk"), Some(Item::List(list)));
        assert_eq!(value("empty"), Some(Item::List(Vec::new())));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        for (wrong, line, part) in [
            ("a = 1\nb 2", 2, "= is missing"),
            ("a = pv", 1, "needs quotes"),
            ("\na = 'x\ny'", 2, "no end"),
            ("a = [ 'x'\n'y' ]", 2, "comma"),
            ("a = [\n'x',", 1, "no ]"),
            ("a = 'x' 'y'", 1, "follows its value"),
            ("a =\n1", 1, "missing"),
            ("= 1", 1, "begins with"),
            ("a = 12x", 1, "no number"),
            ("a = 1\na += 'x'", 2, "+="),
            ("a = {}", 1, "no meaning"),
            ("a = '\\0'", 1, "no character"),
        ] {
            let (at, what) = parse(wrong).unwrap_err();
            assert!(at == line && what.contains(part), "{wrong:?}: {at}: {what}");
        }
        assert!(parse(&format!("a = {}", "[".repeat(100_000))).is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_text_is_too_strange(text in "[a-z='\"\\[\\],;\n #\\\\0-9+]{0,60}") {
            let _ = parse(&text);
        }
    }
}
