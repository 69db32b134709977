//! Python's `strftime`, in UTC and English, for the dates that chat templates print.

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// A time, in seconds since 1970 UTC, as `format` asks; the error names what is not known.
pub(super) fn strftime(seconds: i64, format: &str) -> Result<String, String> {
    let (days, second_of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil_date(days);
    let (hour, minute, second) = (
        second_of_day / 3600,
        second_of_day / 60 % 60,
        second_of_day % 60,
    );
    let month_name = MONTHS[month as usize - 1];
    let weekday = (days + 4).rem_euclid(7);
    let day_name = DAYS[weekday as usize];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let padded = directive != Some('-');
        if !padded {
            directive = chars.next();
        }
        let two = |n: i64| {
            if padded {
                format!("{n:02}")
            } else {
                n.to_string()
            }
        };
        let part = match directive {
            Some('Y') => year.to_string(),
            Some('y') => two(year.rem_euclid(100)),
            Some('m') => two(month),
            Some('d') => two(day),
            Some('H') => two(hour),
            Some('I') => two((hour + 11) % 12 + 1),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_string(),
            Some('B') => month_name.to_string(),
            Some('b' | 'h') => month_name[..3].to_string(),
            Some('A') => day_name.to_string(),
            Some('a') => day_name[..3].to_string(),
            Some('w') => weekday.to_string(),
            Some('j') => {
                let day_of_year = days - days_before(year, 1, 1) + 1;
                if padded {
                    format!("{day_of_year:03}")
                } else {
                    day_of_year.to_string()
                }
            }
            Some('e') => format!("{day:2}"),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".to_string(),
            Some('z') => "+0000".to_string(),
            Some('%') => "%".to_string(),
            other => {
                let other = other.map(String::from).unwrap_or_default();
                return Err(format!("strftime_now does not know %{other}"));
            }
        };
        out.push_str(&part);
    }
    Ok(out)
}

/// Days from 1970-01-01 to a date of the Gregorian calendar, counting years from March so that
/// the leap day is the last (Howard Hinnant, "chrono-compatible low-level date algorithms").
fn days_before(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// The year, month and day that is `days` after 1970-01-01.
fn civil_date(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_of_two_centuries_round_trip() {
        for days in -40_000..60_000 {
            let (year, month, day) = civil_date(days);
            assert_eq!(days_before(year, month, day), days);
        }
        assert_eq!(civil_date(0), (1970, 1, 1));
        assert_eq!(civil_date(11_016), (2000, 2, 29));
    }

    #[test]
    fn strftime_as_python() {
        // datetime(2024, 7, 26, 15, 4, 5, tzinfo=timezone.utc)
        let now = 1_722_006_245;
        let format = "%d %b %Y|%A, %B %-d|%Y-%m-%d %H:%M:%S|%I:%M %p|%a %y %j %w|%F %T %%";
        assert_eq!(
            strftime(now, format).unwrap(),
            "26 Jul 2024|Friday, July 26|2024-07-26 15:04:05|03:04 PM|Fri 24 208 5|\
             2024-07-26 15:04:05 %"
        );
        assert!(strftime(0, "%Q").is_err());
        assert!(strftime(0, "%").is_err());
    }
}
